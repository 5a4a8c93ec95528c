"""Files on a disk or behind an address like s3://bucket/name, whole or by ranges of bytes.

Addresses are read through fsspec and the package it names for each kind of address, both of which
are imported when the first one is met.
"""

import contextlib
import functools
from collections.abc import Iterator

import numpy as np

from mlm_jax.errors import DataError

# Of a remote file, aligned chunks are read and the last ones kept: neighbouring ranges then cost
# one request. Samples come shuffled, so a chunk is no larger than what a request takes to begin.
CHUNK, CHUNKS_KEPT = 2**17, 512


def whole(path: str) -> np.ndarray:
    """uint8 [bytes]: a local file mapped into memory, a remote one read at once."""
    return Remote(path).whole() if "://" in path else mapped(path)


def by_ranges(path: str) -> "np.ndarray | Remote":
    """Has a len and gives slices as uint8 arrays, of which only what is asked for is read.

    Raises DataError where the file is missing or unreadable, now or at a slice.
    """
    return Remote(path) if "://" in path else mapped(path)


def mapped(path: str) -> np.ndarray:
    with naming(path), open(path, "rb") as file:
        if not file.seek(0, 2):  # an empty file cannot be mapped
            return np.empty(0, np.uint8)
        return np.memmap(file, np.uint8, mode="r").view(np.ndarray)


class Remote:
    """A file behind an address. Threads may share it."""

    def __init__(self, path: str):
        self.path = path
        with naming(path):
            from fsspec.core import url_to_fs

            self._system, self._name = url_to_fs(path)
            size = self._system.size(self._name)
        if size is None:
            raise DataError(f"{path}: its server does not say how large it is; copy it to a disk")
        self._size = size
        self._chunk = functools.lru_cache(CHUNKS_KEPT)(self._read_chunk)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, wanted: slice) -> np.ndarray:
        begin, end, _ = wanted.indices(self._size)
        first = begin // CHUNK
        chunks = [self._chunk(number) for number in range(first, -(-end // CHUNK))]
        joined = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        return np.frombuffer(joined, np.uint8)[begin - first * CHUNK : end - first * CHUNK]

    def whole(self) -> np.ndarray:
        return np.frombuffer(self._read(0, self._size), np.uint8)

    def _read_chunk(self, number: int) -> bytes:
        return self._read(number * CHUNK, min((number + 1) * CHUNK, self._size))

    def _read(self, begin: int, end: int) -> bytes:
        with naming(self.path):
            found = self._system.cat_file(self._name, start=begin, end=end)
        if len(found) != end - begin:
            raise DataError(
                f"{self.path}: bytes {begin}-{end} came as {len(found)}; it changed while it was"
                " open: start again"
            )
        return found


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """A failure to read from within becomes a DataError that names the file."""
    try:
        yield
    except FileNotFoundError:
        half = path.endswith((".idx", ".bin"))
        hint = "; a dataset is PREFIX.idx beside PREFIX.bin and is named by PREFIX alone"
        raise DataError(f"{path}: no such file{hint if half else ''}") from None
    except ImportError as error:
        packages = "fsspec, and with it s3fs for s3:// or gcsfs for gs://"
        raise DataError(f"{path}: {error}; addresses are read with {packages}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # each kind of address has a package with errors of its own
        if "://" not in path:
            raise
        kind = type(error).__name__
        raise DataError(f"{path}: cannot be read: {kind}: {error}") from error
