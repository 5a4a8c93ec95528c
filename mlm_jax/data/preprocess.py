"""Text files to token files, as Megatron-LM's tools/preprocess_data.py writes them."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm_jax.data.indexed import IndexedWriter, token_dtype
from mlm_jax.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from mlm_jax.errors import DataError

log = logging.getLogger(__name__)

CHUNK = 8_000_000  # characters tokenized at once: enough for all cores, little memory


class Counts(NamedTuple):
    """What was written. text_bytes is the size of the documents in UTF-8, without EODs."""

    documents: int
    tokens: int
    text_bytes: int


def build(
    inputs: Sequence[Path | str],
    tokenizer: Tokenizer,
    output: Path | str,
    *,
    json_key: str = "text",
    append_eod: bool = False,
) -> Counts:
    """Tokenizes JSON lines into OUTPUT_{json_key}_document.{bin,idx}.

    Each line of an input is an object whose json_key is a document; blank lines are skipped. A
    .txt file is one document. An empty document has no sequence and no EOD, as in Megatron.
    Raises DataError for existing output, for a line that is no such object, for no documents.
    """
    prefix = Path(f"{output}_{json_key}_document")
    for file in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
        if file.exists():
            raise DataError(f"{file}: already exists; remove it or choose another output")
    texts = (text for file in inputs for text in read_texts(Path(file), json_key))
    return write_documents(texts, tokenizer, prefix, append_eod=append_eod)


def write_documents(
    texts: Iterable[str], tokenizer: Tokenizer, prefix: Path, *, append_eod: bool
) -> Counts:
    """Writes PREFIX.bin and PREFIX.idx, one document a text; an existing pair is replaced."""
    eod: list[int] = []
    if append_eod:
        if tokenizer.eod_id is None:
            known = ", ".join(END_OF_DOCUMENT)
            raise DataError(f"{prefix}: append_eod needs a tokenizer with one of {known}")
        eod = [tokenizer.eod_id]
    documents = tokens = text_bytes = 0
    with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for chunk in chunks(texts, CHUNK):
            for ids in map(np.asarray, tokenizer.encode_many(chunk)):
                sequence = [*ids, *eod] if len(ids) else []
                writer.add_document([sequence] if sequence else [])
                tokens += len(sequence)
            documents += len(chunk)
            text_bytes += sum(len(text.encode()) for text in chunk)
            log.info("%s: %d documents, %d tokens", prefix, documents, tokens)
        if not documents:
            raise DataError(f"{prefix}: there are no documents to write; check the input files")
    return Counts(documents, tokens, text_bytes)


def read_texts(file: Path, json_key: str) -> Iterator[str]:
    try:
        with file.open("rb") as lines:
            if file.suffix == ".txt":
                yield decoded(lines.read(), str(file))
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield document(line, json_key, f"{file}, line {number}")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def document(line: bytes, json_key: str, where: str) -> str:
    try:
        fields = json.loads(decoded(line, where))
    except (ValueError, RecursionError) as error:
        hint = "an input is .txt, or has one JSON object a line"
        raise DataError(f"{where}: not JSON ({error}); {hint}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a {type(fields).__name__}, not an object with {json_key!r}")
    if not isinstance(fields.get(json_key), str):
        there = ", ".join(f"{key} ({type(value).__name__})" for key, value in fields.items())
        raise DataError(f"{where}: no text under {json_key!r}; there is {there or 'nothing'}")
    try:
        fields[json_key].encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which no tokenizer takes
        raise DataError(f"{where}: not valid Unicode: {error}") from None
    return fields[json_key]


def decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error}") from None


def chunks(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Lists of texts, none empty, each closed once it has this many characters."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text) + 1  # empty texts fill a chunk too
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
