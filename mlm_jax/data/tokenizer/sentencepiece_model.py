"""SentencePiece models, unigram and BPE, through the sentencepiece package."""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlm_jax.data.tokenizer.batch_encoder import threads
from mlm_jax.data.tokenizer.settings import added_tokens, end_of_document, special_ids, write_config
from mlm_jax.errors import DataError

SPACE = "▁"  # U+2581, what a space is written as


class SentencePieceTokenizer:
    """A Tokenizer over a SentencePiece model, and tokens that the config adds behind it.

    The ids of a text are the package's own. Control pieces (<s>, </s>) are not found in a text;
    added tokens are, by their names, and the texts between them are encoded each alone.
    """

    def __init__(self, model: bytes, config: Mapping[str, Any] | None = None):
        import sentencepiece  # only who has such a model waits for it

        try:
            if not model:
                raise RuntimeError("it is empty")  # which the package takes for a model
            self.model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise DataError(
                "this tokenizer cannot be read: it is neither a SentencePiece model nor lines of a"
                " token in base64 and its rank (tiktoken)"
            ) from None
        self.config: Mapping[str, Any] = dict(config or {})
        self.pieces = [self.model.id_to_piece(id) for id in range(self.model.vocab_size())]
        added = {id: token.content for id, token in added_tokens(self.config).items()}
        # Below the model's size the config only repeats what the model says.
        self.added = {id: name for id, name in added.items() if id >= len(self.pieces)}
        self.vocab_size = 1 + max([len(self.pieces) - 1, *self.added])
        self._ids = {name: id for id, name in enumerate(self.pieces)}
        self._ids |= {name: id for id, name in self.added.items()}
        longest_first = sorted(self.added.values(), key=len, reverse=True)
        cut = "|".join(map(re.escape, longest_first))
        self._cut = re.compile(f"({cut})") if cut else None
        own = {role: getattr(self.model, f"{role}_id")() for role in ("bos", "eos", "pad", "unk")}
        own = {role: id for role, id in own.items() if id >= 0}
        self.special: Mapping[str, int] = own | special_ids(self.config, self.id_of)
        self.eod_id = end_of_document(self.special, self.id_of)

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0].tolist()

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._cut is None or not any(map(self._cut.search, texts)):
            return [np.array(ids, np.int32) for ids in self._encode(texts)]
        # re.split puts the added tokens at the odd places.
        parts = [self._cut.split(text) for text in texts]
        between = iter(self._encode([part for text in parts for part in text[::2]]))
        joined = (
            ([self._ids[part]] if n % 2 else next(between) for n, part in enumerate(text))
            for text in parts
        )
        return [np.array([*itertools.chain(*ids)], np.int32) for ids in joined]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.model.encode(list(texts), out_type=int, num_threads=threads())

    def decode(self, ids: Iterable[int]) -> str:
        runs = itertools.groupby(map(int, ids), key=self._named.__contains__)
        return "".join(
            "".join(self._named[id] for id in run) if by_name else self.model.decode(list(run))
            for by_name, run in runs
        )

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int32)
        for id in self._ordinary():
            byte = self.model.is_byte(id)
            sizes[id] = 1 if byte else len(self.pieces[id].replace(SPACE, " ").encode())
        return sizes

    def continues_word(self) -> np.ndarray:
        continues = np.zeros(self.vocab_size, bool)
        for id in self._ordinary():
            piece = self.pieces[id]
            text = chr(int(piece[3:5], 16)) if self.model.is_byte(id) else piece
            continues[id] = not (text.startswith(SPACE) or text[:1].isspace())
        return continues

    def _ordinary(self) -> Iterable[int]:
        return (id for id in range(len(self.pieces)) if id not in self._named)

    @functools.cached_property
    def _named(self) -> dict[int, str]:
        """What the ids are called that stand for no text: control pieces, unknown, added tokens."""
        kinds = (self.model.is_control, self.model.is_unknown, self.model.is_unused)
        named = {id: p for id, p in enumerate(self.pieces) if any(kind(id) for kind in kinds)}
        gaps = dict.fromkeys(range(len(self.pieces), self.vocab_size), "")  # between added tokens
        return named | gaps | self.added

    def fingerprint(self) -> str:
        content = hashlib.sha256(b"sentencepiece\n" + self.model.serialized_model_proto())
        content.update(repr(sorted(self.added.items())).encode())
        return content.hexdigest()

    def same_as(self, other: object) -> bool:
        same_kind = isinstance(other, SentencePieceTokenizer)
        return same_kind and self.fingerprint() == other.fingerprint()

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.model and tokenizer_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self.model.serialized_model_proto())
        write_config(folder, self.config)
