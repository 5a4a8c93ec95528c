"""Files as streams of bytes, unpacked; what is damaged or cannot be unpacked here is named."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from mlm_jax.errors import DataError

BLOCK = 1 << 20


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """What goes wrong in reading a file becomes a DataError that names it."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise DataError(f"{name}: damaged or incomplete: {error}") from None


def is_compressed(file: str) -> bool:
    return file.lower().endswith((".gz", ".zst"))


@contextlib.contextmanager
def open_parquet(file: str) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile, whose columns are the keys of JSON lines."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{file}: needs pyarrow: pip install pyarrow") from None
    with told(file):
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                yield parquet
        except pyarrow.ArrowException as error:
            raise DataError(f"{file}: damaged, or no parquet: {error}") from None


def decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    if name.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType]
    if name.lower().endswith(".zst"):
        return io.BufferedReader(ZstdFile(raw, name), BLOCK)
    return raw


class ZstdFile(io.RawIOBase):
    """What a file of Zstandard frames holds. A frame that is cut off is an EOFError: the package's
    own reader takes it for the end."""

    def __init__(self, raw: BinaryIO, name: str):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{name}: needs zstandard: pip install zstandard") from None
        self._raw, self._out, self._in_frame = raw, b"", False
        self._failure = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = self._decompressor.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._out:
            block = self._frame.unused_data if self._frame.eof else b""
            # Little at once: what comes out can be a thousand times as much.
            block = block or self._raw.read(1 << 12)
            if not block and self._in_frame:
                raise EOFError("the file ends inside of a frame")
            if not block:
                return 0
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            try:
                self._out = self._frame.decompress(block)
            except self._failure as error:
                raise OSError(str(error)) from None
            self._in_frame = not self._frame.eof
        given, self._out = self._out[: len(buffer)], self._out[len(buffer) :]
        buffer[: len(given)] = given
        return len(given)
