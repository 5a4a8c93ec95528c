"""Text files to token files, as Megatron-LM's tools/preprocess_data.py writes them."""

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlm_jax.data.preprocess.encoding import Counts, Recipe, added
from mlm_jax.data.preprocess.inputs import expand, parts, total_size
from mlm_jax.data.preprocess.progress import Progress
from mlm_jax.data.preprocess.unfinished import Unfinished, started
from mlm_jax.data.preprocess.workers import Task, here, in_processes
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.errors import ConfigError, DataError, MlmJaxError
from mlm_jax.stop import StopSignals

log = logging.getLogger(__name__)


def build(
    inputs: Sequence[Path | str],
    tokenizer: Path | str,
    output: Path | str,
    *,
    workers: int = 1,
    part_bytes: int | None = None,
    **recipe: Any,
) -> Counts:
    """Tokenizes files into OUTPUT_{key}_document.{bin,idx}, with sentences OUTPUT_{key}_sentence.

    inputs              files and patterns, see `inputs.expand`; "-" is standard input
    tokenizer           what load_tokenizer reads
    workers             processes of one thread each; 1: this one
    part_bytes          of a part of the input; None: by the size of the file
    recipe              see `encoding.Recipe`

    The output does not depend on workers and part_bytes. Finished parts are kept in OUTPUT.building
    until the output is whole, and a later call with the same arguments goes on with them; workers,
    on_error and max_document_bytes may be others, and inputs that have changed are read again.

    Raises DataError for a request or input that cannot be used, MlmJaxError where writing fails,
    Stopped after SIGINT or SIGTERM.
    """
    if workers < 1:
        raise ConfigError(f"workers={workers}: give 1 or more")
    how = Recipe(load_tokenizer(tokenizer), **recipe)
    level = "sentence" if how.split_sentences else "document"
    prefixes = [Path(f"{output}_{key}_{level}") for key in how.json_keys]
    files = expand(inputs)
    try:
        with (
            started(Path(output), prefixes, how) as unfinished,
            StopSignals() as stop,
            Progress(total_size(files), stop) as progress,
        ):
            return write(unfinished, files, workers, part_bytes, progress)
    except OSError as error:
        kept = "what is finished is kept, and the same command goes on from there"
        where = error.filename or f"{output}.building"
        raise MlmJaxError(f"{where}: cannot be written: {error.strerror}; {kept}") from None


def write(
    unfinished: Unfinished, files: Sequence[str], workers: int, part_bytes: int | None,
    progress: Progress,
) -> Counts:  # fmt: skip
    """Writes every part that is not finished, then joins all."""
    recipe = unfinished.recipe
    names: list[str] = []  # of all parts, in order; of a file that is named twice, twice
    counts: dict[str, Counts] = {}

    def tasks() -> Iterator[Task]:
        limit = recipe.max_document_bytes
        for part in parts(files, recipe.json_keys, limit, part_bytes, progress.show):
            names.append(part.name)
            if part.name not in counts:
                found = unfinished.finished(part.name)
                counts[part.name] = found or Counts()
                if not found:
                    yield part, unfinished.part_prefixes(part.name)
                    continue
            progress.skip(part.size)

    todo = tasks()
    first = list(itertools.islice(todo, 2))  # a single part needs no other process
    todo = itertools.chain(first, todo)
    alone = workers == 1 or len(first) < 2
    done = here(todo, recipe, progress) if alone else in_processes(todo, workers, recipe, progress)
    with contextlib.closing(done):
        for part, counts[part.name], problem in done:
            unfinished.finish(part.name, counts[part.name])
            if problem:
                more = counts[part.name].skipped - 1
                log.warning("skipped: %s%s", problem, f" ({more} more near it)" if more else "")
    if progress.found:
        log.info("%s had %d MB of input finished", unfinished.folder, progress.found // 10**6)
    together = added(Counts(), *(counts[name] for name in names))
    if not together.documents:
        unfinished.discard()
        skipped = f" ({together.skipped} were skipped)" * bool(together.skipped)
        prefix = unfinished.prefixes[0]
        raise DataError(f"{prefix}: there are no documents to write{skipped}; check the inputs")
    unfinished.join(names, progress.show)
    return together
