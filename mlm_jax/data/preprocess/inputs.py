"""What is read: names, patterns and streams, cut in parts that do not depend on each other.

*.jsonl, any other name    stretches of bytes, moved to the ends of lines
*.gz, *.zst                whole files, since nobody can begin in their middle
*.txt                      whole files: one document each
*.parquet                  groups of rows
-, pipes                   copied to files of whole lines as they come: JSON lines
"""

import dataclasses
import glob
import hashlib
import json
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlm_jax.data.preprocess.opening import is_compressed, open_parquet, told
from mlm_jax.errors import DataError

STDIN = "-"
BLOCK = 1 << 20
LEAST, MOST = 1 << 20, 1 << 26  # bytes of a part, unless it is a whole file
OF_STREAM = 1 << 24


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of the input.

    file           as it was named
    form           "jsonl", "txt" or "parquet"
    begin, end     bytes of plain JSON lines, of which it has the lines that begin there; groups of
                   rows of parquet; else 0, 0: the whole file
    size           bytes of input, roughly
    stamp          what tells this content from another: of a file its size and time
    copy           of a stream: where its lines are
    lines_before   of a stream: how many were before these
    """

    file: str
    form: str
    begin: int
    end: int
    size: int
    stamp: str
    copy: str | None = None
    lines_before: int = 0

    @property
    def path(self) -> str:
        return self.copy or self.file

    @property
    def name(self) -> str:
        """Equal for equal content only: what is finished is found again by it."""
        place = self.file if self.copy else os.path.abspath(self.file)
        about = json.dumps([place, self.form, self.begin, self.end, self.stamp])
        return hashlib.sha256(about.encode()).hexdigest()[:24]

    def forget(self) -> None:
        """Nobody will read it again."""
        if self.copy:
            os.unlink(self.copy)


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


def is_stream(file: str) -> bool:
    return file == STDIN or not stat.S_ISREG(os.stat(file).st_mode)


def form_of(file: str) -> str:
    inner = file.lower().removesuffix(".gz").removesuffix(".zst")
    return next((form for form in ("txt", "parquet") if inner.endswith(f".{form}")), "jsonl")


def cut(
    files: Sequence[str], keys: Sequence[str], spool: Path, part_bytes: int | None,
    pause: Callable[[], None],
) -> Iterator[Part]:  # fmt: skip
    """The parts of all files, in order.

    spool: where streams are copied to, a file for each part; pause: called while one is waited for.
    The parts of a file depend on nothing else, so that other workers or inputs find them again.
    """
    for file in files:
        if is_stream(file):
            yield from copied(file, spool, part_bytes or OF_STREAM, pause)
            continue
        with told(file):
            about = os.stat(file)
        size, stamp = about.st_size, f"{about.st_size} bytes of {about.st_mtime_ns}"
        step = part_bytes or min(max(size // 64, LEAST), MOST)
        form = form_of(file)
        if form == "parquet":
            if is_compressed(file):
                raise DataError(f"{file}: parquet is compressed inside; unpack the file around it")
            groups = list(row_groups(file, keys, step))
            unpacked = sum(n_bytes for _, _, n_bytes in groups)
            for begin, end, n_bytes in groups:
                yield Part(file, form, begin, end, size * n_bytes // max(unpacked, 1), stamp)
        elif form == "txt" or is_compressed(file):
            yield Part(file, form, 0, 0, size, stamp)
        else:
            for begin in range(0, size, step):
                end = min(begin + step, size)
                yield Part(file, form, begin, end, end - begin, stamp)


def row_groups(file: str, keys: Sequence[str], step: int) -> Iterator[tuple[int, int, int]]:
    """(first, end, bytes unpacked) of groups of rows that have `step` bytes together."""
    with open_parquet(file) as parquet:
        there = parquet.schema_arrow.names
        if missing := [key for key in keys if key not in there]:
            raise DataError(f"{file}: no column {missing[0]!r}; there is {', '.join(there)}")
        begin = n_bytes = 0
        for group in range(parquet.num_row_groups):
            n_bytes += parquet.metadata.row_group(group).total_byte_size
            if n_bytes >= step or group == parquet.num_row_groups - 1:
                yield begin, group + 1, n_bytes
                begin, n_bytes = group + 1, 0


def copied(file: str, spool: Path, step: int, pause: Callable[[], None]) -> Iterator[Part]:
    """The lines of a stream in files of `step` bytes or a little more, each written when asked for.

    Where it is cut depends on what comes alone, not on when, so that it can be found again.
    """
    with open(sys.stdin.fileno() if file == STDIN else file, "rb", 0, closefd=file != STDIN) as s:
        rest, lines, number, ended = b"", 0, 0, False
        while not ended:
            copy, digest, size, before = spool / f"stream-{number}", hashlib.sha256(), 0, lines
            with copy.open("wb") as out:
                whole = False
                while not (whole or ended):
                    block = rest or read_block(s, pause)
                    end = block.find(b"\n", max(step - size, 1) - 1) + 1
                    whole, ended = bool(end), not block
                    kept, rest = (block[:end], block[end:]) if whole else (block, b"")
                    out.write(kept)
                    digest.update(kept)
                    size, lines = size + len(kept), lines + kept.count(b"\n")
            stamp = f"{number} {digest.hexdigest()}"
            if size:
                yield Part(file, "jsonl", 0, size, size, stamp, str(copy), before)
            else:
                copy.unlink()
            number += 1


def read_block(stream, pause: Callable[[], None]) -> bytes:
    """What has come, at most a block; empty at the end."""
    while not select.select([stream], [], [], 0.2)[0]:
        pause()
    return stream.read(BLOCK)
