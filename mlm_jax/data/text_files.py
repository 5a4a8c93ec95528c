"""Files of text, unpacked, and the JSON object of a line; a DataError says what is wrong in them.

Errors about a file name it; those about a line do not say where it is, which its reader knows.
"""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from mlm_jax.errors import DataError

BLOCK = 1 << 20


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """What goes wrong in reading a file becomes a DataError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:  # the latter two of damaged files
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{name}: cannot be read: {why}") from None


def is_compressed(file: str) -> bool:
    return file.lower().endswith((".gz", ".zst"))


def decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    if name.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType]
    if name.lower().endswith(".zst"):
        return io.BufferedReader(ZstdFile(raw, name), BLOCK)
    return raw


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


def read_line(file: BinaryIO, limit: int) -> bytes:
    """The next line; of one longer than limit the first limit + 1 bytes."""
    line = file.readline(limit + 1)
    if len(line) > limit and not line.endswith(b"\n"):
        skip_line(file)
    return line


def skip_line(file: BinaryIO) -> None:
    while (rest := file.readline(BLOCK)) and not rest.endswith(b"\n"):
        pass


def json_object(line: bytes) -> dict[str, Any] | None:
    """The fields of a line; None if it is blank."""
    if not (text := decoded(line)).strip():
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}); a line has one JSON object") from None
    if not isinstance(fields, dict):
        raise DataError(f"a {type(fields).__name__}; a line has one JSON object")
    return fields


def decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}") from None


def text_of(fields: Mapping[str, Any], key: str) -> str:
    if not isinstance(value := fields.get(key), str):
        raise lacks(fields, f"a text under {key!r}")
    utf8_size(value)
    return value


def lacks(fields: Mapping[str, Any], wanted: str) -> DataError:
    there = ", ".join(f"{key} ({type(value).__name__})" for key, value in fields.items())
    return DataError(f"it lacks {wanted}; there is {there or 'nothing'}")


def utf8_size(text: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:  # half of a surrogate pair, which no tokenizer takes
        raise DataError(f"not valid Unicode: {error}") from None


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
