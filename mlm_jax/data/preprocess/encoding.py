"""Documents to sequences of tokens, and one part of the input to token files."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from mlm_jax.data.indexed_writer import IndexedWriter, token_dtype
from mlm_jax.data.preprocess.documents import read_documents
from mlm_jax.data.preprocess.inputs import Part
from mlm_jax.data.preprocess.sentences import sentences
from mlm_jax.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from mlm_jax.errors import DataError

CHUNK = 100_000  # bytes tokenized at once by one thread: more fit no cache, and are slower
SHOWN = 3  # problems of a part that are told; all are counted


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
    """What becomes of a document; see `mlm_jax.data.preprocess.build`."""

    json_keys: tuple[str, ...]
    append_eod: bool
    split_sentences: bool
    on_error: str
    max_document_bytes: int


class Encoder:
    """Writes texts as documents of tokens, as Megatron-LM does.

    A document is one sequence, or one for each of its sentences. Sequences without a token are
    left out, and EOD ends the last one: an empty document has no sequence, and no EOD.

    Raises DataError where EOD is wanted of a tokenizer that has none.
    """

    def __init__(self, tokenizer: Tokenizer, append_eod: bool, split_sentences: bool = False):
        self.tokenizer, self.split = tokenizer, split_sentences
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.eod = tokenizer.eod_id if append_eod else None
        if append_eod and self.eod is None:
            known = ", ".join(END_OF_DOCUMENT)
            raise DataError(f"append_eod needs a tokenizer with one of {known}")

    def write(self, texts: Sequence[str], writer: IndexedWriter) -> int:
        """Adds a document for each text; returns how many tokens they have."""
        pieces, n_pieces = list(texts), np.ones(len(texts), np.int64)
        if self.split:
            split = [sentences(text) for text in texts]
            pieces = [sentence for document in split for sentence in document]
            n_pieces = np.array([len(document) for document in split])
        ids = [np.asarray(i, np.int64) for i in self.tokenizer.encode_many(pieces)]
        tokens = np.concatenate([np.empty(0, np.int64), *ids])
        lengths = np.array([len(i) for i in ids], np.int64)
        document_of = np.repeat(np.arange(len(texts)), n_pieces)[lengths > 0]
        lengths = lengths[lengths > 0]
        if self.eod is not None and len(lengths):
            is_last = np.append(document_of[1:] != document_of[:-1], True)
            tokens = np.insert(tokens, np.cumsum(lengths)[is_last], self.eod)
            lengths = lengths + is_last
        writer.add_documents(tokens, lengths, np.bincount(document_of, minlength=len(texts)))
        return len(tokens)


def write_part(
    part: Part, recipe: Recipe, encoder: Encoder, prefixes: Sequence[str],
    tick: Callable[[int, int, int], None],
) -> tuple[Counts, list[str]]:  # fmt: skip
    """Writes a part under a prefix for each key; returns also what was wrong with documents.

    tick is told of documents, their bytes, and bytes of input since it was called last.
    """
    problems: list[str] = []
    skipped = 0

    def refuse(problem: str) -> None:
        nonlocal skipped
        if recipe.on_error == "stop":
            raise DataError(f"{problem}; --on_error skip passes over such documents")
        skipped += 1
        problems.extend([problem] * (len(problems) < SHOWN))

    found = read_documents(part, recipe.json_keys, recipe.max_document_bytes, refuse)
    documents = tokens = text_bytes = read = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(p, encoder.dtype)) for p in prefixes]
        for chunk in chunks(found, CHUNK, lambda document: document.text_bytes):
            by_key = zip(*(document.texts for document in chunk), strict=True)
            tokens += sum(map(encoder.write, by_key, writers))
            n_bytes, n_read = (sum(column) for column in list(zip(*chunk, strict=True))[1:])
            documents, text_bytes, read = (
                documents + len(chunk),
                text_bytes + n_bytes,
                read + n_read,
            )
            tick(len(chunk), n_bytes, n_read)
    tick(0, 0, part.size - read)
    return Counts(documents, tokens, text_bytes, skipped), problems


def chunks(things: Iterable, size: int, size_of: Callable[..., int] = len) -> Iterator[list]:
    """Lists of texts or documents, none empty, each closed once it has this size."""
    chunk, total = [], 0
    for thing in things:
        chunk.append(thing)
        total += size_of(thing) + 1  # empty texts fill a chunk too
        if total >= size:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk
