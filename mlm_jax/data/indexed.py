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

Source: megatron/core/datasets/indexed_dataset.py (core 0.20).
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlm_jax.errors import DataError

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {  # by their code in the header
    code: np.dtype(name)
    for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}


class IndexedDataset:
    """A pair of token files: the index read and checked, the tokens mapped into memory.

    prefix      what both paths begin with
    dtype       of a token in the file
    lengths     int32 [S]        tokens
    offsets     int64 [S]        bytes
    documents   int64 [D + 1]    sequences
    n_tokens    of all sequences together; may be 0

    Raises DataError for files that are missing, damaged or do not belong together.
    """

    def __init__(self, prefix: Path | str):
        self.prefix = Path(prefix)
        self.dtype, self.lengths, self.offsets, self.documents = read_index(file_of(prefix, "idx"))
        self.n_tokens = int(self.lengths.sum(dtype=np.int64))
        self._tokens = map_tokens(file_of(prefix, "bin"), self.dtype, self.n_tokens)

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self):  # or pickle would send another process all tokens, not the path
        return IndexedDataset, (self.prefix,)

    def fingerprint(self) -> dict[str, Any]:
        """What tells these tokens from others, wherever the files are.

        crc32 covers all lengths and documents, and a million tokens from either end.
        """
        ends = self._tokens[:1_000_000], self._tokens[-1_000_000:]
        crc32 = 0
        for part in (self.lengths, self.documents, *ends):
            crc32 = zlib.crc32(np.ascontiguousarray(part).data, crc32)
        counts = {"documents": len(self.documents) - 1, "sequences": len(self)}
        return counts | {"tokens": self.n_tokens, "dtype": self.dtype.name, "crc32": crc32}

    def tokens(self, i: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Sequence i, or `length` of its tokens from `offset` on: a read-only view of the file."""
        begin = self.offsets[i] // self.dtype.itemsize
        sequence = self._tokens[begin : begin + self.lengths[i]]
        return sequence[offset : None if length is None else offset + length]


def read_index(idx: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    with opened(idx) as file:
        size = os.fstat(file.fileno()).st_size
        require(size >= HEADER.size, idx, f"{size} bytes are too few for the header")
        magic, version, code, n, d = HEADER.unpack(file.read(HEADER.size))
        require(magic == MAGIC, idx, "it does not begin as the index of a dataset does")
        require(version == VERSION, idx, f"version {version} instead of {VERSION}")
        require(code in DTYPES, idx, f"dtype code {code} instead of {min(DTYPES)}-{max(DTYPES)}")
        expected = HEADER.size + 12 * n + 8 * d
        wrong_size = f"{size} bytes, where {n} sequences and {d} boundaries take {expected}"
        require(size == expected, idx, wrong_size)
        lengths, offsets, documents = (
            np.fromfile(file, t, count) for t, count in (("<i4", n), ("<i8", n), ("<i8", d))
        )
    require(bool(np.all(lengths >= 0)), idx, "a sequence has a negative length")
    consistent = np.array_equal(offsets, begins(lengths, DTYPES[code]))
    require(consistent, idx, "the sequences' lengths and offsets contradict each other")
    whole = d > 0 and documents[0] == 0 and documents[-1] == n
    require(bool(whole), idx, f"its documents do not span its {n} sequences")
    in_order = bool(np.all(documents[:-1] <= documents[1:]))
    require(in_order, idx, "a document ends before it begins")
    return DTYPES[code], lengths, offsets, documents


def map_tokens(data: Path, dtype: np.dtype, n_tokens: int) -> np.ndarray:
    with opened(data) as file:
        size, expected = os.fstat(file.fileno()).st_size, n_tokens * dtype.itemsize
        wrong_size = f"{size} bytes, where its .idx has {n_tokens} {dtype.name} tokens: {expected}"
        require(size == expected, data, wrong_size)
        if not n_tokens:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(file, dtype, mode="r").view(np.ndarray)


def begins(lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """int64 [S] bytes: each sequence begins where the one before it ends."""
    return (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize


def file_of(prefix: Path | str, kind: str) -> Path:
    return Path(f"{prefix}.{kind}")


@contextlib.contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    try:
        with file.open("rb") as stream:
            yield stream
    except FileNotFoundError:
        hint = "a dataset is PREFIX.idx beside PREFIX.bin and is named by PREFIX alone"
        raise DataError(f"{file}: no such file; {hint}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def require(ok: bool, file: Path, problem: str) -> None:
    if not ok:
        raise DataError(f"{file}: {problem}; build it again with `mlm-jax data build`")
