"""The documents of a part of the input: each a text under every key that was asked for."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from mlm_jax.data.preprocess.inputs import Part
from mlm_jax.data.preprocess.opening import decompressed, is_compressed, open_parquet, told
from mlm_jax.errors import DataError

BLOCK = 1 << 20


class Document(NamedTuple):
    """texts: one for each key. text_bytes: of them in UTF-8. read: bytes of input it took."""

    texts: tuple[str, ...]
    text_bytes: int
    read: int


class UnusableError(ValueError):
    """Why one document cannot be used; whoever catches it knows where it is."""


# A document as it lies there, and how many bytes of input it took.
Raw = tuple[Any, int]


def read_documents(
    part: Part, keys: Sequence[str], limit: int, refuse: Callable[[str], None]
) -> Iterator[Document]:
    """All documents of a part; blank lines are none.

    limit    bytes of a document, with what JSON adds: a longer one is not read into memory
    refuse   called with a message that names file, line and problem of a document that cannot be
             used; if it returns, the document is passed over

    Raises DataError where the file itself cannot be read further.
    """
    raws, parse = {
        "jsonl": (json_lines, parse_line), "txt": (whole_text, parse_text),
        "parquet": (parquet_rows, parse_row),
    }[part.form]  # fmt: skip
    with told(part.file):
        for number, (raw, read) in enumerate(raws(part, keys, limit)):
            try:
                texts = parse(raw, keys, limit)
                if texts is None:
                    continue
                document = Document(texts, sum(map(utf8_size, texts)), read)
            except UnusableError as problem:
                refuse(f"{place(part, number)}: {problem}")
                continue
            yield document


def place(part: Part, number: int) -> str:
    """Where the document is that has this number in the part, for a person."""
    if part.form == "txt":
        return part.file
    if part.form == "parquet":
        with open_parquet(part.file) as parquet:
            groups = (parquet.metadata.row_group(group) for group in range(part.begin))
            return f"{part.file}, row {sum(group.num_rows for group in groups) + number + 1}"
    return f"{part.file}, line {part.lines_before + lines_before(part) + number + 1}"


def lines_before(part: Part) -> int:
    """Lines of the file that begin before this part: they are counted only if one must be named."""
    if not part.begin:
        return 0
    left, count = part.begin - 1, 1  # the line that ends at begin - 1 or behind it
    with open(part.path, "rb") as file:
        while block := file.read(min(left, BLOCK)):
            left, count = left - len(block), count + block.count(b"\n")
    return count


# JSON lines


def json_lines(part: Part, keys: Sequence[str], limit: int) -> Iterator[Raw]:
    """The lines that begin in the part; of one longer than limit the first limit + 1 bytes."""
    with open(part.path, "rb") as raw:
        if part.copy or not is_compressed(part.file):
            if part.begin:
                raw.seek(part.begin - 1)
                skip_line(raw)
            position = raw.tell()
            while position < part.end and (line := raw.readline(limit + 1)):
                read = len(line) + (skip_line(raw) if is_cut(line, limit) else 0)
                position += read
                yield line, read
            return
        position = 0
        with decompressed(raw, part.file) as file:
            while line := file.readline(limit + 1):
                if is_cut(line, limit):
                    skip_line(file)
                before, position = position, raw.tell()
                yield line, position - before


def is_cut(line: bytes, limit: int) -> bool:
    return len(line) > limit and not line.endswith(b"\n")


def skip_line(file: BinaryIO) -> int:
    """Reads to the end of the line; returns how many bytes that were."""
    skipped = 0
    while piece := file.readline(BLOCK):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def parse_line(line: bytes, keys: Sequence[str], limit: int) -> tuple[str, ...] | None:
    if not line.strip():
        return None
    if is_cut(line, limit):
        raise UnusableError(f"longer than max_document_bytes={limit:,}")
    try:
        fields = json.loads(decoded(line))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnusableError):
            raise
        hint = "an input is .txt, .parquet, or has one JSON object a line"
        raise UnusableError(f"not JSON ({error}); {hint}") from None
    if not isinstance(fields, dict):
        raise UnusableError(f"a {type(fields).__name__}, not an object with {keys[0]!r}")
    texts = tuple(fields.get(key) for key in keys)
    if not all(isinstance(text, str) for text in texts):
        missing = next(key for key in keys if not isinstance(fields.get(key), str))
        there = ", ".join(f"{key} ({type(value).__name__})" for key, value in fields.items())
        raise UnusableError(f"no text under {missing!r}; there is {there or 'nothing'}")
    return texts  # pyright: ignore[reportReturnType]


def decoded(text: bytes) -> str:
    try:
        return text.decode().removeprefix("\ufeff")  # a byte order mark
    except UnicodeDecodeError as error:
        raise UnusableError(f"not UTF-8: {error}") from None


def utf8_size(text: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:  # half of a surrogate pair, which no tokenizer takes
        raise UnusableError(f"not valid Unicode: {error}") from None


# Plain text


def whole_text(part: Part, keys: Sequence[str], limit: int) -> Iterator[Raw]:
    if len(keys) > 1:
        raise DataError(f"{part.file}: has one text, for json_keys={' '.join(keys)}")
    with open(part.file, "rb") as raw, decompressed(raw, part.file) as file:
        yield file.read(limit + 1), part.size


def parse_text(content: bytes, keys: Sequence[str], limit: int) -> tuple[str, ...]:
    if len(content) > limit:
        raise UnusableError(f"longer than max_document_bytes={limit:,}")
    return (decoded(content),)


# Parquet


def parquet_rows(part: Part, keys: Sequence[str], limit: int) -> Iterator[Raw]:
    groups = range(part.begin, part.end)
    with open_parquet(part.file) as parquet:
        rows = sum(parquet.metadata.row_group(group).num_rows for group in groups)
        batches = parquet.iter_batches(batch_size=256, row_groups=groups, columns=list(keys))
        for batch in batches:
            columns = [batch.column(key) for key in keys]
            for row in range(batch.num_rows):
                yield [column[row] for column in columns], part.size // rows


def parse_row(row: Sequence[Any], keys: Sequence[str], limit: int) -> tuple[str, ...]:
    try:
        values = tuple(value.as_py() for value in row)
    except UnicodeDecodeError as error:
        raise UnusableError(f"not UTF-8: {error}") from None
    for key, value in zip(keys, values, strict=True):
        if not isinstance(value, str):
            raise UnusableError(f"no text under {key!r}; there is a {type(value).__name__}")
        if len(value) > limit:
            raise UnusableError(f"longer than max_document_bytes={limit:,}")
    return values
