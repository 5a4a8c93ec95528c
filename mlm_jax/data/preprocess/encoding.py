"""Documents to sequences of tokens, and one part of the input to token files."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mlm_jax.data.indexed_writer import IndexedWriter, token_dtype
from mlm_jax.data.preprocess.documents import read_documents
from mlm_jax.data.preprocess.inputs import Part, chunks
from mlm_jax.data.preprocess.sentences import sentences
from mlm_jax.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from mlm_jax.errors import ConfigError, DataError, MlmJaxError

CHUNK = 100_000  # bytes tokenized at once by one thread: more is not faster
ON_ALL_CORES = 8_000_000


class Counts(NamedTuple):
    """What was written, under all keys together.

    text_bytes    of the documents in UTF-8, without EODs
    skipped       documents that could not be used
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: int = 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What becomes of a document, as Megatron-LM does it.

    json_keys           of the texts in a JSON line, or columns of parquet
    append_eod          ends each document that is not empty
    split_sentences     a sequence is a sentence; else, a document
    on_error            skip: documents that cannot be used are counted and passed over
    max_document_bytes  of a line, row or text file; what is longer cannot be used

    Sequences without a token are left out, and EOD ends the last one: an empty document has no
    sequence, and no EOD. Raises ConfigError for settings that cannot be, DataError where EOD is
    wanted of a tokenizer that has none.
    """

    tokenizer: Tokenizer
    json_keys: Sequence[str] = ("text",)
    append_eod: bool = False
    split_sentences: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    max_document_bytes: int = 1 << 30

    def __post_init__(self):
        keys, limit = self.json_keys, self.max_document_bytes
        problems = []
        if self.on_error not in ("stop", "skip"):
            problems.append(f"on_error={self.on_error!r}: give stop or skip")
        if limit < 1:
            problems.append(f"max_document_bytes={limit}: give 1 or more")
        if not keys or len({*keys}) < len(keys) or any("/" in key for key in keys):
            problems.append(f"json_keys={' '.join(keys)}: give different names, as files have")
        if problems:
            raise ConfigError("\n  ".join(problems))
        if self.append_eod and self.tokenizer.eod_id is None:
            known = ", ".join(END_OF_DOCUMENT)
            raise DataError(f"append_eod needs a tokenizer with one of {known}")

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.tokenizer.vocab_size)

    def identity(self) -> dict[str, Any]:
        """What decides the tokens of a document that can be used."""
        return {
            "tokenizer": self.tokenizer.fingerprint(), "dtype": self.dtype.name,
            "eod": self.tokenizer.eod_id, "json_keys": list(self.json_keys),
            "append_eod": self.append_eod, "split_sentences": self.split_sentences,
        }  # fmt: skip

    def write(self, texts: Sequence[str], writer: IndexedWriter) -> int:
        """Adds a document for each text; returns how many tokens they have."""
        pieces, n_pieces = list(texts), np.ones(len(texts), np.int64)
        if self.split_sentences:
            split = [sentences(text) for text in texts]
            pieces = [sentence for document in split for sentence in document]
            n_pieces = np.array([len(document) for document in split])
        try:
            ids = [np.asarray(i, np.int64) for i in self.tokenizer.encode_many(pieces)]
        except Exception as error:  # all that the libraries of tokenizers raise is bare
            raise MlmJaxError(f"the tokenizer failed: {type(error).__name__}: {error}") from error
        tokens = np.concatenate([np.empty(0, np.int64), *ids])
        lengths = np.array([len(i) for i in ids], np.int64)
        document_of = np.repeat(np.arange(len(texts)), n_pieces)[lengths > 0]
        lengths = lengths[lengths > 0]
        eod = self.tokenizer.eod_id if self.append_eod else None
        if eod is not None and len(lengths):
            is_last = np.append(document_of[1:] != document_of[:-1], True)
            tokens = np.insert(tokens, np.cumsum(lengths)[is_last], eod)
            lengths = lengths + is_last
        writer.add_documents(tokens, lengths, np.bincount(document_of, minlength=len(texts)))
        return len(tokens)


def write_part(
    part: Part, recipe: Recipe, prefixes: Sequence[str], tick: Callable[[int, int, int], None]
) -> tuple[Counts, str]:
    """Writes a part under a prefix for each key; returns also what is wrong with the first skipped.

    tick is told of documents, their bytes, and bytes of input since it was called last.
    """
    problems, counts, read = [], Counts(), 0

    def refuse(problem: str) -> None:
        if recipe.on_error == "stop":
            raise DataError(f"{problem}; --on_error skip passes over such documents")
        problems.append("" if problems else problem)  # those behind the first only count

    limit = recipe.max_document_bytes
    found = (d for p in part.pieces for d in read_documents(p, recipe.json_keys, limit, refuse))
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(p, recipe.dtype)) for p in prefixes]
        for chunk in chunks(found, CHUNK, lambda document: document.text_bytes):
            texts, sizes, reads = zip(*chunk, strict=True)
            tokens = sum(map(recipe.write, zip(*texts, strict=True), writers))
            counts = added(counts, Counts(len(chunk), tokens, sum(sizes)))
            read += sum(reads)
            tick(len(chunk), sum(sizes), sum(reads))
    tick(0, 0, part.size - read)
    return counts._replace(skipped=len(problems)), problems[0] if problems else ""


def write_documents(texts: Iterable[str], tokenizer: Tokenizer, prefix: Path, **how: Any) -> Counts:
    """Writes PREFIX.bin and PREFIX.idx, one document a text; an existing pair is replaced.

    how: see Recipe.
    """
    recipe, counts = Recipe(tokenizer, **how), Counts()
    with IndexedWriter(prefix, recipe.dtype) as writer:
        for chunk in chunks(texts, ON_ALL_CORES):
            n_bytes = sum(len(text.encode()) for text in chunk)
            counts = added(counts, Counts(len(chunk), recipe.write(chunk, writer), n_bytes))
        if not counts.documents:
            raise DataError(f"{prefix}: there are no documents to write")
    return counts


def added(*counts: Counts) -> Counts:
    return Counts(*map(sum, zip(*counts, strict=True)))
