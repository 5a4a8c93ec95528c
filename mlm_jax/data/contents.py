"""What a pair of token files holds, for a person."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlm_jax.data.indexed import IndexedDataset, file_of
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import DataError

BLOCK = 1 << 22  # tokens looked at together
SAMPLES, SEQUENCES, TOKENS = 3, 3, 32  # shown: documents, sequences of each, tokens of each
WIDTH = 40


def describe(prefix: Path, tokenizer: Tokenizer | None = None) -> Iterator[str]:
    """Lines about PREFIX.bin and .idx: counts, sizes, lengths; with a tokenizer, their beginning.

    Raises DataError where the pair is not whole, or has tokens that are no ids of the tokenizer:
    for that all of them are read.
    """
    indexed = IndexedDataset(prefix)
    sizes = (os.path.getsize(file_of(prefix, kind)) for kind in ("bin", "idx"))
    yield f"{len(indexed.documents) - 1:,} documents, {len(indexed):,} sequences"
    yield f"{indexed.n_tokens:,} tokens as {indexed.dtype}"
    yield "{:,} bytes in .bin, {:,} in .idx; the pair is whole".format(*sizes)
    ends = np.concatenate([[0], np.cumsum(indexed.lengths, dtype=np.int64)])[indexed.documents]
    yield from histogram(np.diff(ends))
    if tokenizer is not None:
        check_ids(indexed, tokenizer)
        yield from samples(indexed, tokenizer)


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """Documents by their tokens, in powers of two."""
    if not len(lengths):
        return
    middle = int(np.median(lengths))
    least, most, mean = lengths.min(), lengths.max(), lengths.mean()
    yield f"tokens a document: {least:,} least, {middle:,} median, {mean:,.1f} mean, {most:,} most"
    counts = np.bincount(np.frexp(lengths)[1])  # n is below 2^k, and not below 2^(k - 1)
    for k in range(np.flatnonzero(counts)[0], len(counts)):
        first, last = (2 ** (k - 1), 2**k - 1) if k else (0, 0)
        bar = "#" * -(-WIDTH * counts[k] // counts.max())
        yield f"{first:>13,} to {last:<13,} {counts[k]:>12,} {bar}".rstrip()


def check_ids(indexed: IndexedDataset, tokenizer: Tokenizer) -> None:
    file, vocab_size = file_of(indexed.prefix, "bin"), tokenizer.vocab_size
    if indexed.dtype.kind not in "iu":
        raise DataError(f"{file} was not built with this tokenizer: it has {indexed.dtype} tokens")
    wrong, first, position = 0, None, 0
    with file.open("rb") as tokens:
        while len(block := np.fromfile(tokens, indexed.dtype, BLOCK)):
            outside = np.flatnonzero((block < 0) | (block >= vocab_size))
            if len(outside) and first is None:
                first = position + int(outside[0]), block[outside[0]]
            wrong, position = wrong + len(outside), position + len(block)
    if first is not None:
        ends = np.cumsum(indexed.lengths, dtype=np.int64)
        sequence = int(np.searchsorted(ends, first[0], side="right"))
        raise DataError(
            f"{file} was not built with this tokenizer: {wrong:,} of {position:,} tokens are none"
            f" of its ids, 0 to {vocab_size - 1:,}; the first is {first[1]} in sequence {sequence}"
        )


def samples(indexed: IndexedDataset, tokenizer: Tokenizer) -> Iterator[str]:
    """How the first documents that have tokens begin, a text for each of their sequences."""
    begins, ends = indexed.documents[:-1], indexed.documents[1:]
    for n in np.flatnonzero(ends > begins)[:SAMPLES]:
        shown = range(begins[n], min(ends[n], begins[n] + SEQUENCES))
        texts = (tokenizer.decode(indexed.tokens(i, 0, TOKENS)) for i in shown)
        yield f"[{n}] {' '.join(map(repr, texts))}"
