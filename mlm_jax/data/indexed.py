r"""Megatron-LM's token files, byte for byte: PREFIX.bin beside PREFIX.idx.

PREFIX.bin is every token one after another, without a header. PREFIX.idx, all little-endian:

    magic            9 bytes          b"MMIDIDX\x00\x00"
    version          uint64           1
    dtype code       uint8            see DTYPES
    sequence count   uint64           S
    document count   uint64           D + 1
    lengths          int32 [S]        tokens of each sequence
    offsets          int64 [S]        where each begins in PREFIX.bin, in bytes
    documents        int64 [D + 1]    document d is sequences documents[d] up to documents[d + 1]

A multimodal dataset has one byte more for each sequence, its mode. It is refused: its sequences
are not all text.

Source: megatron/core/datasets/indexed_dataset.py (core 0.20).
"""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mlm_jax.data import files
from mlm_jax.errors import DataError

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {  # by their code in the header
    code: np.dtype(name)
    for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}


class IndexedDataset:
    """A pair of token files, on a disk or behind an address like s3://bucket/name.

    prefix      what both paths begin with: a Path, or the text of an address
    dtype       of a token in the file
    lengths     int32 [S]        tokens
    offsets     int64 [S]        bytes
    documents   int64 [D + 1]    sequences
    n_tokens    of all sequences together; may be 0

    Local files are mapped into memory. Of remote ones the index is read whole, and of the tokens
    what is asked for. Both arrive read-only; threads may share them.

    Raises DataError for files that are missing, damaged or do not belong together.
    """

    def __init__(self, prefix: Path | str):
        self.prefix = str(prefix) if "://" in str(prefix) else Path(prefix)
        self.dtype, self.lengths, self.offsets, self.documents = read_index(f"{prefix}.idx")
        self.n_tokens = int(self.lengths.sum(dtype=np.int64))
        self._bytes = files.by_ranges(f"{prefix}.bin")
        size, expected = len(self._bytes), self.n_tokens * self.dtype.itemsize
        tokens = f"{self.n_tokens} {self.dtype.name} tokens"
        wrong_size = f"{size} bytes, where its .idx has {tokens}: {expected}"
        require(size == expected, f"{prefix}.bin", wrong_size)

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self):  # or pickle would send another process all tokens, not the path
        return IndexedDataset, (self.prefix,)

    def fingerprint(self) -> dict[str, Any]:
        """What tells these tokens from others, wherever the files are.

        crc32 covers all lengths and documents, and a million tokens from either end.
        """
        ends = self._read(0, 1_000_000), self._read(self.n_tokens - 1_000_000, self.n_tokens)
        crc32 = 0
        for part in (self.lengths, self.documents, *ends):
            crc32 = zlib.crc32(np.ascontiguousarray(part).data, crc32)
        counts = {"documents": len(self.documents) - 1, "sequences": len(self)}
        return counts | {"tokens": self.n_tokens, "dtype": self.dtype.name, "crc32": crc32}

    def tokens(self, i: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Sequence i, or `length` of its tokens from `offset` on; no others are read."""
        begin = int(self.offsets[i]) // self.dtype.itemsize
        sequence = range(begin, begin + int(self.lengths[i]))
        window = sequence[offset : None if length is None else offset + length]
        return self._read(window.start, window.stop)

    def _read(self, begin: int, end: int) -> np.ndarray:
        size = self.dtype.itemsize
        return self._bytes[max(begin, 0) * size : end * size].view(self.dtype)


def read_index(idx: str) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """dtype, lengths, offsets and documents. Raises DataError with what contradicts what."""
    data = files.whole(idx)
    require(len(data) >= HEADER.size, idx, f"{len(data)} bytes are too few for the header")
    magic, version, code, n, d = HEADER.unpack(data[: HEADER.size].tobytes())
    require(magic == MAGIC, idx, "it does not begin as the index of a dataset does")
    require(version == VERSION, idx, f"version {version} instead of {VERSION}")
    require(code in DTYPES, idx, f"dtype code {code} instead of {min(DTYPES)}-{max(DTYPES)}")
    expected = HEADER.size + 12 * n + 8 * d
    if n and len(data) == expected + n:
        raise DataError(f"{idx}: has modes of a multimodal dataset, and only text is read here")
    wrong_size = f"{len(data)} bytes, where {n} sequences and {d} boundaries take {expected}"
    require(len(data) == expected, idx, wrong_size)
    lengths, offsets, documents = (
        np.frombuffer(data, dtype, count, HEADER.size + begin)
        for dtype, count, begin in (("<i4", n, 0), ("<i8", n, 4 * n), ("<i8", d, 12 * n))
    )
    check_sequences(idx, lengths, offsets, DTYPES[code].itemsize)
    check_documents(idx, documents, n)
    # In the file they lie between words, which costs much where they are looked up at random.
    return DTYPES[code], lengths.copy(), offsets, documents


CHECKED_AT_ONCE = 2**18  # entries: what checks compute then stays in the processor's cache


def check_sequences(idx: str, lengths: np.ndarray, offsets: np.ndarray, itemsize: int) -> None:
    """Each sequence begins where the one before it ends."""
    begin = 0
    for k in range(0, len(lengths), CHECKED_AT_ONCE):
        these = slice(k, k + CHECKED_AT_ONCE)
        sizes = lengths[these].astype(np.int64) * itemsize
        require(bool(sizes.min() >= 0), idx, "a sequence has a negative length")
        ends = begin + np.cumsum(sizes)
        wrong = np.flatnonzero(offsets[these] != ends - sizes)
        if wrong.size:
            i, place = k + int(wrong[0]), int((ends - sizes)[wrong[0]])
            problem = "the sequences' lengths and offsets contradict each other"
            where = f"sequence {i} is said to begin at byte {offsets[i]} instead of {place}"
            require(False, idx, f"{problem}: {where}")
        begin = int(ends[-1])


def check_documents(idx: str, documents: np.ndarray, n: int) -> None:
    """They are all n sequences, one after another."""
    whole = len(documents) > 0 and documents[0] == 0 and documents[-1] == n
    require(bool(whole), idx, f"its documents do not span its {n} sequences")
    for k in range(0, len(documents), CHECKED_AT_ONCE):
        these = documents[k : k + CHECKED_AT_ONCE + 1]  # one more, the first of the next
        require(bool(np.all(these[:-1] <= these[1:])), idx, "a document ends before it begins")


def begins(lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """int64 [S] bytes: each sequence begins where the one before it ends."""
    return (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize


def file_of(prefix: Path | str, kind: str) -> Path:
    return Path(f"{prefix}.{kind}")


def require(ok: bool, file: str, problem: str) -> None:
    if not ok:
        raise DataError(f"{file}: {problem}; build it again with `mlm-jax data build`")
