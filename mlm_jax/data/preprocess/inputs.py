"""What is read: names, patterns and streams, cut in parts that do not depend on each other.

*.jsonl, any other name    stretches of bytes, moved to the ends of lines
*.gz, *.zst                whole files, since nobody can begin in their middle
*.txt                      whole files: one document each
*.parquet                  groups of rows
-, pipes                   lines as they come: JSON lines

Small pieces that follow each other, such as thousands of .txt, are one part.
"""

import dataclasses
import glob
import hashlib
import io
import json
import os
import select
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlm_jax.data.text_files import BLOCK, is_compressed, open_parquet, read_line, told
from mlm_jax.errors import DataError

STDIN = "-"
LEAST, MOST = 1 << 20, 1 << 26  # bytes of a piece, unless it is a whole file
OF_STREAM = 1 << 23  # it waits in memory, for each worker more than once
OF_OPENING = 1 << 12  # bytes that could be read in the time it takes to open a file


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of one file.

    file           as it was named
    form           "jsonl", "txt" or "parquet"
    begin, end     bytes of plain JSON lines, of which it has the lines that begin there; a group of
                   rows of parquet; numbers of lines of a stream; else 0, 0: the whole file
    size           bytes of input, roughly
    stamp          what tells this content from another: of a file its size and time
    lines          of a stream
    """

    file: str
    form: str
    begin: int
    end: int
    size: int
    stamp: str
    lines: tuple[bytes, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Pieces that are encoded together, and kept once they are."""

    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def name(self) -> str:
        """Equal for equal content only: what is finished is found again by it."""
        about = [(os.path.abspath(p.file), p.form, p.begin, p.end, p.stamp) for p in self.pieces]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]


def expand(inputs: Sequence[Path | str]) -> list[str]:
    """The files that these names and patterns stand for, those of a pattern in sorted order.

    Raises DataError, which names them all, where a pattern matches nothing, a file cannot be read,
    or is a folder.
    """
    files: list[str] = []
    problems: list[str] = []
    for name in map(os.path.expanduser, map(str, inputs)):
        found = [name]
        if name != STDIN and glob.has_magic(name) and not os.path.exists(name):
            found = sorted(f for f in glob.glob(name, recursive=True) if not os.path.isdir(f))
            if not found:
                problems.append(f"{name}: no file matches this pattern")
        for file in found:
            if file != STDIN and (problem := unreadable(file)):
                problems.append(f"{file}: cannot be read: {problem}")
        files += found
    if files.count(STDIN) > 1:
        problems.append(f"{STDIN}: standard input can be read once")
    if problems:
        raise DataError("\n  ".join(problems))
    return files


def unreadable(file: str) -> str | None:
    try:
        if not stat.S_ISFIFO(os.stat(file).st_mode):  # opening one would wait for its writer
            open(file, "rb").close()
    except OSError as error:
        return error.strerror
    return None


def total_size(files: Sequence[str]) -> int | None:
    """Bytes; None where one is a stream, of which nobody knows."""
    return None if any(map(is_stream, files)) else sum(map(os.path.getsize, files))


def is_stream(file: str) -> bool:
    return file == STDIN or not stat.S_ISREG(os.stat(file).st_mode)


def form_of(file: str) -> str:
    inner = file.lower().removesuffix(".gz").removesuffix(".zst")
    return next((form for form in ("txt", "parquet") if inner.endswith(f".{form}")), "jsonl")


def parts(
    files: Sequence[str], keys: Sequence[str], limit: int, part_bytes: int | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Iterator[Part]:  # fmt: skip
    """The parts of all files, in order; pause is called while a stream is waited for.

    Where they are cut depends on the files alone, so that any workers find them again. Lines of a
    stream that are longer than limit are cut short: `read_documents` refuses them.
    """
    pieces = (piece for file in files for piece in cut(file, keys, limit, part_bytes, pause))
    for group in chunks(pieces, part_bytes or LEAST, lambda piece: piece.size + OF_OPENING):
        yield Part(tuple(group))


def chunks(things: Iterable, size: int, size_of: Callable[..., int] = len) -> Iterator[list]:
    """Lists of texts, documents or pieces, none empty, each closed once it has this size."""
    chunk, total = [], 0
    for thing in things:
        chunk.append(thing)
        total += size_of(thing) + 1  # empty texts fill a chunk too
        if total >= size:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def cut(
    file: str, keys: Sequence[str], limit: int, part_bytes: int | None, pause: Callable[[], None]
) -> Iterator[Piece]:
    if is_stream(file):
        yield from pieces_of_stream(file, limit, part_bytes or OF_STREAM, pause)
        return
    with told(file):
        about = os.stat(file)
    size, stamp = about.st_size, f"{about.st_size} bytes of {about.st_mtime_ns}"
    step = part_bytes or min(max(size // 64, LEAST), MOST)
    form = form_of(file)
    if form == "parquet":
        if is_compressed(file):
            raise DataError(f"{file}: parquet is compressed inside; unpack the file around it")
        for group in range(n := row_groups(file, keys)):
            yield Piece(file, form, group, group + 1, size // n, stamp)
    elif form == "txt" or is_compressed(file):
        yield Piece(file, form, 0, 0, size, stamp)
    else:
        for begin in range(0, size, step):
            end = min(begin + step, size)
            yield Piece(file, form, begin, end, end - begin, stamp)


def row_groups(file: str, keys: Sequence[str]) -> int:
    with open_parquet(file) as parquet:
        there = parquet.schema_arrow.names
        if missing := [key for key in keys if key not in there]:
            raise DataError(f"{file}: no column {missing[0]!r}; there is {', '.join(there)}")
        return parquet.num_row_groups


def pieces_of_stream(
    file: str, limit: int, step: int, pause: Callable[[], None]
) -> Iterator[Piece]:
    """Lines of `step` bytes or a little more.

    Where it is cut depends on what comes alone, not on when, so that it can be found again.
    """
    source = sys.stdin.fileno() if file == STDIN else file
    with open(source, "rb", 0, closefd=file != STDIN) as raw:
        stream: Any = io.BufferedReader(Patient(raw, pause), BLOCK)
        lines = iter(lambda: read_line(stream, limit), b"")
        begin = 0
        for stretch in chunks(lines, step):
            size, stamp = sum(map(len, stretch)), hashlib.sha256(b"".join(stretch)).hexdigest()
            end = begin + len(stretch)
            yield Piece(file, "jsonl", begin, end, size, stamp, tuple(stretch))
            begin = end


class Patient(io.RawIOBase):
    """A stream; while it is waited for, pause is called, which may raise."""

    def __init__(self, raw: io.FileIO, pause: Callable[[], None]):
        self.raw, self.pause = raw, pause

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        while not select.select([self.raw], [], [], 0.2)[0]:
            self.pause()
        return self.raw.readinto(buffer)
