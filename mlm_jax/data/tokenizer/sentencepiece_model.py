"""SentencePiece models, unigram and BPE, through the sentencepiece package."""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlm_jax.data.tokenizer.base import Tokenizer
from mlm_jax.data.tokenizer.batch_encoder import threads
from mlm_jax.data.tokenizer.settings import added_tokens
from mlm_jax.errors import DataError

SPACE = "▁"  # U+2581, what a space is written as


class SentencePieceTokenizer(Tokenizer):
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
                "it is neither a SentencePiece model nor lines of a token in base64 and its rank"
                " (tiktoken)"
            ) from None
        size, config = self.model.vocab_size(), config or {}
        added = {id: token.content for id, token in added_tokens(config).items()}
        # Below the model's size the config only repeats what the model says.
        self.added = {id: name for id, name in added.items() if id >= size}
        self._names = {id: self.model.id_to_piece(id) for id in range(size)} | self.added
        self._ids = {name: id for id, name in self._names.items()}
        longest_first = sorted(self.added.values(), key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        own = {role: getattr(self.model, f"{role}_id")() for role in ("bos", "eos", "pad", "unk")}
        own = {role: id for role, id in own.items() if id >= 0}
        super().__init__(1 + max(self._names), config, own)

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0].tolist()

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        # re.split puts the added tokens at the odd places.
        split = [self._cut.split(text) if self.added else [text] for text in texts]
        between = [part for parts in split for part in parts[::2]]
        encoded = iter(self.model.encode(between, out_type=int, num_threads=threads()))
        joined = (
            [[self._ids[part]] if n % 2 else next(encoded) for n, part in enumerate(parts)]
            for parts in split
        )
        return [np.array([*itertools.chain(*ids)], np.int32) for ids in joined]

    def decode(self, ids: Iterable[int]) -> str:
        runs = itertools.groupby(map(int, ids), key=self.texts().__contains__)
        return "".join(
            self.model.decode(list(run)) if is_text
            else "".join(self._names.get(id, "") for id in run)
            for is_text, run in runs
        )  # fmt: skip

    def texts(self) -> Mapping[int, bytes]:
        return self._texts

    @functools.cached_property
    def _texts(self) -> Mapping[int, bytes]:
        def text(id: int) -> bytes:
            if model.is_byte(id):
                return bytes.fromhex(self._names[id][3:5])
            return self._names[id].replace(SPACE, " ").encode()

        model, ids = self.model, range(self.model.vocab_size())
        none = (model.is_control, model.is_unknown, model.is_unused)
        return {id: text(id) for id in ids if not any(kind(id) for kind in none)}

    def fingerprint(self) -> str:
        content = hashlib.sha256(b"sentencepiece\n" + self.model.serialized_model_proto())
        content.update(repr(sorted(self.added.items())).encode())
        return content.hexdigest()

    def write_model(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self.model.serialized_model_proto())
