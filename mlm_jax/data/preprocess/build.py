"""Text files to token files, as Megatron-LM's tools/preprocess_data.py writes them."""

import contextlib
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from mlm_jax.data.indexed_writer import IndexedWriter
from mlm_jax.data.preprocess import workers as pool
from mlm_jax.data.preprocess.building import FORMAT, Building, opened
from mlm_jax.data.preprocess.encoding import Counts, Encoder, Recipe, chunks
from mlm_jax.data.preprocess.inputs import Part, cut, expand, is_stream
from mlm_jax.data.preprocess.progress import Progress
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mlm_jax.distributed import StopSignals
from mlm_jax.errors import ConfigError, DataError, MlmJaxError

log = logging.getLogger(__name__)

CHUNK = 8_000_000  # characters tokenized at once: enough for all cores, little memory
# What a folder's tokenizer is made of; beside it may lie the weights of a model.
OF_TOKENIZERS = (".json", ".txt", ".model", ".tiktoken", ".bpe")


def build(
    inputs: Sequence[Path | str],
    tokenizer: Path | str,
    output: Path | str,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    split_sentences: bool = False,
    workers: int = 1,
    on_error: Literal["stop", "skip"] = "stop",
    max_document_bytes: int = 1 << 30,
    part_bytes: int | None = None,
) -> Counts:
    """Tokenizes files into OUTPUT_{key}_document.{bin,idx}, with sentences OUTPUT_{key}_sentence.

    inputs              files and patterns, see `inputs.expand`; "-" is standard input
    tokenizer           its file or folder
    json_keys           of the texts in a JSON line, or columns of parquet
    append_eod          ends each document that is not empty
    split_sentences     a sequence is a sentence; else, a document
    workers             processes of one thread each; 1: this one
    on_error            skip: documents that cannot be used are counted and passed over
    max_document_bytes  of a line, row or text file; what is longer cannot be used
    part_bytes          of a part of the input; None: by the size of the file

    The output does not depend on workers and part_bytes. Finished parts are kept in OUTPUT.building
    until the output is whole, and a later call with the same arguments goes on with them; workers,
    on_error and max_document_bytes may be others, and inputs that have changed are read again.

    Raises DataError for a request or input that cannot be used, MlmJaxError where writing fails,
    Stopped after SIGINT or SIGTERM.
    """
    recipe = Recipe(tuple(json_keys), append_eod, split_sentences, on_error, max_document_bytes)
    check(recipe, workers)
    level = "sentence" if split_sentences else "document"
    prefixes = [Path(f"{output}_{key}_{level}") for key in recipe.json_keys]
    encoder = Encoder(load_tokenizer(tokenizer), append_eod, split_sentences)
    common = {
        "format": FORMAT, "tokenizer": fingerprint(Path(tokenizer)), "dtype": encoder.dtype.name,
        "eod": encoder.eod, "json_keys": list(json_keys), "append_eod": append_eod,
        "split_sentences": split_sentences,
    }  # fmt: skip
    files = expand(inputs)
    try:
        with opened(Path(output), prefixes, recipe) as building:
            building.begin(common)
            if (published := building.publish(files)) is not None:
                return published
            building.check_output()
            return write(building, files, encoder, Path(tokenizer), workers, part_bytes)
    except OSError as error:
        kept = "what is finished is kept, and the same command goes on from there"
        where = error.filename or f"{output}.building"
        raise MlmJaxError(f"{where}: cannot be written: {error.strerror}; {kept}") from None


def write(
    building: Building, files: Sequence[str], encoder: Encoder, tokenizer: Path, workers: int,
    part_bytes: int | None,
) -> Counts:  # fmt: skip
    """Writes every part that is not finished, then joins all."""
    recipe = building.recipe
    total = None if any(map(is_stream, files)) else sum(map(os.path.getsize, files))
    parts: list[Part] = []
    counts: dict[str, Counts] = {}

    with StopSignals() as stop, Progress(total) as progress:

        def pause() -> None:
            progress.show()
            if stop:
                raise pool.Stopped

        def tasks() -> Iterator[pool.Task]:
            for part in cut(files, recipe.json_keys, building.folder, part_bytes, pause):
                parts.append(part)
                if part.name in counts:  # a file that is named twice
                    progress.skip(part.size)
                    continue
                if (found := building.finished(part)) is not None:
                    counts[part.name] = found
                    progress.skip(part.size)
                    part.forget()
                    continue
                counts[part.name] = Counts()
                yield part, building.part_prefixes(part)

        todo = tasks()
        first = list(itertools.islice(todo, 2 if workers > 1 else 0))
        todo = itertools.chain(first, todo)
        if len(first) < 2:
            done = pool.here(todo, recipe, encoder, progress, pause)
        else:
            done = pool.in_processes(todo, workers, recipe, tokenizer, progress, pause)
        with contextlib.closing(done):
            for part, counts[part.name], problems in done:
                building.finish(part, counts[part.name], problems)
                part.forget()
                tell(part, counts[part.name], problems)
        if progress.found:
            log.info("%s had %d MB of input finished", building.folder, progress.found // 10**6)
        together = total_of(counts[part.name] for part in parts)
        if not together.documents:
            building.discard()
            skipped = f" ({together.skipped} were skipped)" * bool(together.skipped)
            prefix = building.prefixes[0]
            raise DataError(f"{prefix}: there are no documents to write{skipped}; check the inputs")
        building.join(parts, files, together, pause)
    return together


def check(recipe: Recipe, workers: int) -> None:
    problems = []
    if workers < 1:
        problems.append(f"workers={workers}: give 1 or more")
    if recipe.on_error not in ("stop", "skip"):
        problems.append(f"on_error={recipe.on_error!r}: give stop or skip")
    if recipe.max_document_bytes < 1:
        problems.append(f"max_document_bytes={recipe.max_document_bytes}: give 1 or more")
    keys = recipe.json_keys
    if not keys or len({*keys}) < len(keys) or any("/" in key for key in keys):
        problems.append(f"json_keys={' '.join(keys)}: give different names, which files can have")
    if problems:
        raise ConfigError("\n  ".join(problems))


def fingerprint(tokenizer: Path) -> str:
    """A hash of what the tokenizer's file, or the files of its folder, hold."""
    files = [tokenizer] if tokenizer.is_file() else sorted(tokenizer.glob("*"))
    digest = hashlib.sha256(str(tokenizer).encode() if not files else b"")
    for file in (f for f in files if f == tokenizer or f.suffix in OF_TOKENIZERS):
        with file.open("rb") as content:
            digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def total_of(counts: Iterable[Counts]) -> Counts:
    return Counts(*map(sum, zip(*counts, strict=True)))


def tell(part: Part, counts: Counts, problems: Sequence[str]) -> None:
    for problem in problems:
        log.warning("skipped: %s", problem)
    if counts.skipped > len(problems):
        log.warning("skipped: %d more like these of %s", counts.skipped - len(problems), part.file)


def write_documents(
    texts: Iterable[str], tokenizer: Tokenizer, prefix: Path, *, append_eod: bool
) -> Counts:
    """Writes PREFIX.bin and PREFIX.idx, one document a text; an existing pair is replaced."""
    encoder = Encoder(tokenizer, append_eod)
    documents = tokens = text_bytes = 0
    with IndexedWriter(prefix, encoder.dtype) as writer:
        for chunk in chunks(texts, CHUNK):
            tokens += encoder.write(chunk, writer)
            documents += len(chunk)
            text_bytes += sum(len(text.encode()) for text in chunk)
            log.info("%s: %d documents, %d tokens", prefix, documents, tokens)
        if not documents:
            raise DataError(f"{prefix}: there are no documents to write")
    return Counts(documents, tokens, text_bytes)
