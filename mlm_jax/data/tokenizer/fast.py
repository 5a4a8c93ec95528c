"""A tokenizer over a backend of Hugging Face's `tokenizers` library."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders

from mlm_jax.data.tokenizer.base import Tokenizer
from mlm_jax.data.tokenizer.batch_encoder import BatchEncoder
from mlm_jax.data.tokenizer.byte_level import token_of

DECIDE = ("normalizer", "pre_tokenizer", "model", "added_tokens")  # which ids a text gets


class FastTokenizer(Tokenizer):
    """A Tokenizer over the `tokenizers` library."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None):
        backend.no_padding()  # what a file says about them would change every text silently
        backend.no_truncation()
        self.backend, self._encode_many = backend, BatchEncoder(backend)
        size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        super().__init__(size, {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}, {})

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def prompt(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=True).ids

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._encode_many(texts)

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=False)

    def texts(self) -> Mapping[int, bytes]:
        decoder = self.backend.decoder or decoders.WordPiece(cleanup=False)  # it joins by spaces
        byte_level = "ByteLevel" in repr(decoder)
        added = self.backend.get_added_tokens_decoder()

        def text(token: str, id: int) -> bytes:
            if id in added:
                return token.encode()
            if byte_level:
                return token_of(token) or token.encode()
            if re.fullmatch("<0x[0-9A-F]{2}>", token):  # what SentencePiece falls back to
                return bytes.fromhex(token[3:5])
            # Behind another token, for decoders drop a space at the beginning of a text.
            return decoder.decode(["a", token]).removeprefix("a").encode()

        vocab = self.backend.get_vocab(with_added_tokens=True).items()
        return {i: text(t, i) for t, i in vocab if not (i in added and added[i].special)}

    def continues_word(self) -> np.ndarray:
        continues = super().continues_word()
        if mark := getattr(self.backend.model, "continuing_subword_prefix", None):
            for id in self.texts():
                continues[id] = (self.backend.id_to_token(id) or "").startswith(mark)
        return continues

    def fingerprint(self) -> str:
        state = json.loads(self.backend.to_str())
        text = json.dumps({key: state[key] for key in DECIDE}, sort_keys=True)
        return hashlib.sha256(b"tokenizers\n" + text.encode()).hexdigest()

    def write_model(self, folder: Path) -> None:
        self.backend.save(str(folder / "tokenizer.json"))
