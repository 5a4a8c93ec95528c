"""Writing Megatron-LM's token files; the format is described in `mlm_jax.data.indexed`."""

import contextlib
import os
import shutil
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from mlm_jax.data.indexed import DTYPES, HEADER, MAGIC, VERSION, IndexedDataset, begins, file_of
from mlm_jax.errors import DataError, MlmJaxError

BLOCK = 1 << 24  # bytes copied at once


class IndexedWriter:
    """Writes what IndexedDataset reads. Use it with `with`: the files appear, whole, at its end.

    Until then they have temporary names beside the final ones; after an exception they are
    removed, and what was there before stays. In memory are 12 bytes a sequence and 8 a document.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype | type | str):
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype)
        if self.dtype not in DTYPES.values():
            known = ", ".join(d.name for d in DTYPES.values())
            raise DataError(f"{prefix}: the format has no code for {self.dtype}; it knows {known}")
        self._lengths, self._documents = array("i"), array("q", [0])

    def __enter__(self) -> "IndexedWriter":
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._partial("bin").open("wb")
        except OSError as error:
            raise DataError(f"{self.prefix}.bin: cannot be written: {error.strerror}") from None
        return self

    def add_document(self, sequences: Sequence[ArrayLike]) -> None:
        """A document of these sequences of tokens; of none, if it is empty."""
        arrays = [np.asarray(sequence) for sequence in sequences]
        filled = [a for a in arrays if len(a)]  # an empty list would make all of them floats
        tokens = np.concatenate(filled) if filled else np.empty(0, self.dtype)
        self.add_documents(tokens, [len(a) for a in arrays], [len(arrays)])

    def add_documents(self, tokens: np.ndarray, lengths: ArrayLike, sequences: ArrayLike) -> None:
        """Many documents at once.

        tokens [N]       of all sequences, one after another
        lengths [S]      of each sequence, in tokens; together N
        sequences [D]    of each document, how many sequences it has; together S

        Raises DataError for a token outside the dtype, a sequence of 2^31 tokens.
        """
        self._write(tokens)
        self._add_index(np.asarray(lengths, np.int64), np.asarray(sequences, np.int64))

    def add_dataset(self, prefix: Path | str) -> None:
        """All documents of another pair of files, a block at a time."""
        other = IndexedDataset(prefix)
        with file_of(prefix, "bin").open("rb") as file:
            if other.dtype == self.dtype:
                shutil.copyfileobj(file, self._bin, BLOCK)
            else:
                while len(tokens := np.fromfile(file, other.dtype, BLOCK // 8)):
                    self._write(tokens)
        self._add_index(other.lengths, np.diff(other.documents))

    def _write(self, tokens: np.ndarray) -> None:
        with np.errstate(invalid="ignore"):  # what does not fit is told below
            stored = tokens.astype(self.dtype)
        if not np.array_equal(stored, tokens):
            wrong = tokens[stored != tokens][0]
            raise DataError(f"{self.prefix}: token {wrong} does not fit {self.dtype.name}")
        self._bin.write(stored.data)

    def _add_index(self, lengths: np.ndarray, sequences: np.ndarray) -> None:
        if len(lengths) and lengths.max() >= 2**31:
            raise DataError(
                f"{self.prefix}: a sequence of {lengths.max():,} tokens; the format counts to"
                f" {2**31 - 1:,}: cut the document"
            )
        ends = len(self._lengths) + np.cumsum(sequences, dtype=np.int64)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._documents.frombytes(ends.tobytes())

    def __exit__(self, exception_type, exception, traceback) -> None:
        try:
            if exception_type is None:
                sync(self._bin)
                self._write_index()
                file_of(self.prefix, "idx").unlink(missing_ok=True)  # an old one fits no new .bin
                for kind in ("bin", "idx"):
                    self._partial(kind).rename(file_of(self.prefix, kind))
        finally:
            with contextlib.suppress(OSError):  # of a full disk, which has been told
                self._bin.close()
            for kind in ("bin", "idx"):
                self._partial(kind).unlink(missing_ok=True)

    def _write_index(self) -> None:
        lengths = np.asarray(self._lengths, "<i4")
        documents = np.asarray(self._documents, "<i8")
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        with self._partial("idx").open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents)))
            for part in (lengths, begins(lengths, self.dtype), documents):
                file.write(part.data)
            sync(file)

    def _partial(self, kind: str) -> Path:
        return file_of(self.prefix, f"{kind}.partial-{os.getpid()}")


def sync(file: BinaryIO) -> None:
    """Some file systems tell only here that the disk is full."""
    file.flush()
    os.fsync(file.fileno())


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron-LM stores this vocabulary in: uint16 below 65500, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def merge(prefixes: Sequence[Path | str], output: Path | str) -> np.dtype:
    """Writes the documents of all pairs into OUTPUT.bin and .idx; returns the dtype they have.

    They follow each other in the order of prefixes, as in Megatron-LM's tools/merge_datasets.py;
    pairs of different dtypes become the narrowest that holds all of them. Raises DataError for
    output that exists, MlmJaxError where writing fails.
    """
    refuse_existing(output)
    dtype = np.result_type(*(IndexedDataset(prefix).dtype for prefix in prefixes))
    try:
        with IndexedWriter(output, dtype) as writer:
            for prefix in prefixes:
                writer.add_dataset(prefix)
    except OSError as error:
        raise MlmJaxError(f"{output}: cannot be written: {error.strerror}") from None
    return writer.dtype


def refuse_existing(prefix: Path | str) -> None:
    for file in (file_of(prefix, kind) for kind in ("bin", "idx")):
        if file.exists():
            raise DataError(f"{file}: already exists; remove it or choose another output")
