"""The documents of a piece of the input: each a text under every key that was asked for."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlm_jax.data.preprocess.inputs import Piece, expand, parts
from mlm_jax.data.text_files import (
    BLOCK,
    decoded,
    decompressed,
    is_compressed,
    json_object,
    open_parquet,
    read_line,
    skip_line,
    text_of,
    told,
    utf8_size,
)
from mlm_jax.errors import DataError

LONGEST = 1 << 30  # bytes of a document that a tokenizer learns from


class Document(NamedTuple):
    """texts: one for each key. text_bytes: of them in UTF-8. read: bytes of input it took."""

    texts: tuple[str, ...]
    text_bytes: int
    read: int


def read_documents(
    piece: Piece, keys: Sequence[str], limit: int, refuse: Callable[[str], None]
) -> Iterator[Document]:
    """All documents of a piece; blank lines are none.

    limit    bytes of a document, with what JSON adds: a longer one is not read into memory
    refuse   called with a message that names file, line and problem of a document that cannot be
             used; if it returns, the document is passed over

    Raises DataError where the file itself cannot be read further.
    """
    if piece.form == "txt" and len(keys) > 1:
        raise DataError(f"{piece.file}: has one text, for json_keys={' '.join(keys)}")
    raws, fields_of = {
        "jsonl": (json_lines, json_object),
        "txt": (whole_text, lambda content: {keys[0]: decoded(content)}),
        "parquet": (parquet_rows, row_fields),
    }[piece.form]
    with told(piece.file):
        for number, (raw, read) in enumerate(raws(piece, keys, limit)):
            try:
                fields = fields_of(within(raw, limit))
                if fields is None:
                    continue
                texts = tuple(within(text_of(fields, key), limit) for key in keys)
            except DataError as problem:
                refuse(f"{place(piece, number)}: {problem}")
            else:
                yield Document(texts, sum(map(utf8_size, texts)), read)


def read_texts(inputs: Sequence[Path | str], keys: Sequence[str]) -> Iterator[str]:
    """All texts of files and patterns. Raises DataError at the first that cannot be used."""

    def refuse(problem: str) -> None:
        raise DataError(problem)

    for part in parts(expand(inputs), keys, LONGEST):
        for piece in part.pieces:
            for document in read_documents(piece, keys, LONGEST, refuse):
                yield from document.texts


def within(content: Any, limit: int) -> Any:
    if isinstance(content, bytes | str) and len(content) > limit:
        raise DataError(f"longer than max_document_bytes={limit:,}")
    return content


def place(piece: Piece, number: int) -> str:
    """Where the document is that has this number in the piece, for a person."""
    if piece.form == "txt":
        return piece.file
    if piece.form == "parquet":
        with open_parquet(piece.file) as parquet:
            groups = (parquet.metadata.row_group(group) for group in range(piece.begin))
            return f"{piece.file}, row {sum(group.num_rows for group in groups) + number + 1}"
    return f"{piece.file}, line {lines_before(piece) + number + 1}"


def lines_before(piece: Piece) -> int:
    """Lines that begin before this piece: those of a file are counted only if one must be named."""
    if piece.lines is not None or not piece.begin:
        return piece.begin
    left, count = piece.begin - 1, 1  # the line that ends at begin - 1 or behind it
    with open(piece.file, "rb") as file:
        while block := file.read(min(left, BLOCK)):
            left, count = left - len(block), count + block.count(b"\n")
    return count


# A document as it lies in each form, and how many bytes of input it took


def json_lines(piece: Piece, keys: Sequence[str], limit: int) -> Iterator[tuple[bytes, int]]:
    """The lines that begin in the piece."""
    if piece.lines is not None:
        yield from ((line, len(line)) for line in piece.lines)
        return
    with open(piece.file, "rb") as raw, decompressed(raw, piece.file) as file:
        if piece.begin:
            raw.seek(piece.begin - 1)
            skip_line(raw)
        end = math.inf if is_compressed(piece.file) else piece.end
        begin = raw.tell()
        while begin < end and (line := read_line(file, limit)):
            before, begin = begin, raw.tell()
            yield line, begin - before


def whole_text(piece: Piece, keys: Sequence[str], limit: int) -> Iterator[tuple[bytes, int]]:
    with open(piece.file, "rb") as raw, decompressed(raw, piece.file) as file:
        yield file.read(limit + 1), piece.size


def parquet_rows(piece: Piece, keys: Sequence[str], limit: int) -> Iterator[tuple[Any, int]]:
    with open_parquet(piece.file) as parquet:
        rows = parquet.metadata.row_group(piece.begin).num_rows
        for batch in parquet.iter_batches(256, row_groups=[piece.begin], columns=list(keys)):
            for row in range(batch.num_rows):
                yield batch.slice(row, 1), piece.size // rows


def row_fields(row: Any) -> dict[str, Any]:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}") from None
