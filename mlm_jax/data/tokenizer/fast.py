"""A tokenizer over a backend of Hugging Face's `tokenizers` library."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders

from mlm_jax.data.tokenizer.batch_encoder import BatchEncoder
from mlm_jax.data.tokenizer.byte_level import token_of
from mlm_jax.data.tokenizer.settings import end_of_document, special_ids, write_config

DECIDE = ("normalizer", "pre_tokenizer", "model", "added_tokens")  # which ids a text gets


class FastTokenizer:
    """A Tokenizer over the `tokenizers` library."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None):
        backend.no_padding()  # what a file says about them would change every text silently
        backend.no_truncation()
        self.backend = backend
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
        special = special_ids(settings, self.id_of)
        self.eod_id = end_of_document(special, self.id_of)
        if self.eod_id is not None and not {"eos", "sep"} & special.keys():
            # Hugging Face's loaders know the end of a document by this role alone.
            settings["eos_token"] = backend.id_to_token(self.eod_id)
            special["eos"] = self.eod_id
        self.config: Mapping[str, Any] = settings
        self.special: Mapping[str, int] = special
        self._encode_many = BatchEncoder(backend)

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._encode_many(texts)

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int32)
        added = self.backend.get_added_tokens_decoder()
        size_of = len if self._byte_level else self._decoded_size
        for token, id in self._ordinary():
            sizes[id] = len(token.encode()) if id in added else size_of(token)
        return sizes  # byte-level: one character a byte

    def continues_word(self) -> np.ndarray:
        mark = getattr(self.backend.model, "continuing_subword_prefix", None)
        continues = np.zeros(self.vocab_size, bool)
        for token, id in self._ordinary():
            if mark:
                continues[id] = token.startswith(mark)
            elif self._byte_level:
                text = token_of(token)
                continues[id] = not (token.encode() if text is None else text)[:1].isspace()
            elif self._space_in_token:
                continues[id] = not (token.startswith("▁") or token[:1].isspace())
        return continues

    @property
    def _byte_level(self) -> bool:
        return "ByteLevel" in repr(self.backend.decoder)

    @property
    def _space_in_token(self) -> bool:
        """Whether a space is written in the token that it is before, as in SentencePiece."""
        return "▁" in repr(self.backend.decoder)

    def _ordinary(self) -> Iterator[tuple[str, int]]:
        added = self.backend.get_added_tokens_decoder()
        for token, id in self.backend.get_vocab(with_added_tokens=True).items():
            if not (id in added and added[id].special):
                yield token, id

    def _decoded_size(self, token: str) -> int:
        if re.fullmatch("<0x[0-9A-F]{2}>", token):  # what SentencePiece falls back to
            return 1
        decoder = self.backend.decoder or decoders.WordPiece(cleanup=False)  # it joins by spaces
        # Behind another token, for decoders drop a space at the beginning of a text.
        alone, behind = (decoder.decode(tokens) for tokens in (["a"], ["a", token]))
        return len(behind.encode()) - len(alone.encode())

    def fingerprint(self) -> str:
        state = json.loads(self.backend.to_str())
        text = json.dumps({key: state[key] for key in DECIDE}, sort_keys=True)
        return hashlib.sha256(b"tokenizers\n" + text.encode()).hexdigest()

    def same_as(self, other: object) -> bool:
        return isinstance(other, FastTokenizer) and self.fingerprint() == other.fingerprint()

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as Hugging Face's loaders want them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        write_config(folder, self.config)
