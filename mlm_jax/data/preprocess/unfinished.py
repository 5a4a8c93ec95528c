"""OUTPUT.building: the folder of a build that is not whole yet, from which a later start goes on.

lock             held by the one process that builds
manifest.json    the recipe of all parts
NAME_K.bin, .idx, NAME.json     a finished part under the K-th key, and its record
joined_K.bin, .idx              all parts, before they get their final names
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlm_jax.data.indexed import file_of
from mlm_jax.data.indexed_writer import IndexedWriter, refuse_existing
from mlm_jax.data.preprocess.encoding import Counts, Recipe
from mlm_jax.errors import DataError

log = logging.getLogger(__name__)

FORMAT = 2


class Unfinished:
    """What is finished of a build. Use it with `started`."""

    def __init__(self, folder: Path, prefixes: Sequence[Path], recipe: Recipe):
        self.folder, self.prefixes, self.recipe = folder, list(prefixes), recipe
        self.joined = [folder / f"joined_{k}" for k in range(len(prefixes))]

    def begin(self) -> None:
        """Refuses parts of something else, and output that is not ours."""
        manifest, recipe = self.folder / "manifest.json", {"format": FORMAT}
        recipe |= self.recipe.identity()
        there = read_json(manifest)
        if there and there != recipe and (n := self.finished_parts()):
            differ = [
                f"{key} was {there.get(key)!r} and is {value!r}"
                for key, value in recipe.items() if there.get(key) != value
            ]  # fmt: skip
            raise DataError(
                f"{self.folder} has {n} finished parts of another build: {'; '.join(differ)}."
                " Set these back to go on with it, or remove the folder"
            )
        was_joined = file_of(self.joined[-1], "idx").exists()  # killed with some final names given
        for prefix in self.prefixes:
            if was_joined:
                for kind in ("idx", "bin"):
                    file_of(prefix, kind).unlink(missing_ok=True)
            refuse_existing(prefix)
        for leftover in self.folder.glob("*.partial-*"):
            leftover.unlink()
        write_json(manifest, recipe)

    def finished_parts(self) -> int:
        return sum(file.name != "manifest.json" for file in self.folder.glob("*.json"))

    def part_prefixes(self, name: str) -> list[str]:
        return [str(self.folder / f"{name}_{k}") for k in range(len(self.prefixes))]

    def finish(self, name: str, counts: Counts) -> None:
        """A part that has its record is whole."""
        content = {"counts": counts, "max_document_bytes": self.recipe.max_document_bytes}
        write_json(self.folder / f"{name}.json", content)

    def finished(self, name: str) -> Counts | None:
        """What was written of this part, if it would be the same today."""
        record = read_json(self.folder / f"{name}.json")
        if record is None:
            return None
        counts, limit = Counts(*record["counts"]), record["max_document_bytes"]
        if counts.skipped:  # they may be usable now, or stop us
            same = limit == self.recipe.max_document_bytes and self.recipe.on_error == "skip"
        else:
            same = limit <= self.recipe.max_document_bytes
        return counts if same else None

    def join(self, names: Sequence[str], pause: Callable[[], None]) -> None:
        """Puts the parts together and gives them their final names; pause may raise."""
        for k, joined in enumerate(self.joined):
            with IndexedWriter(joined, self.recipe.dtype) as writer:
                for name in names:
                    pause()
                    writer.add_dataset(self.part_prefixes(name)[k])
        for kind in ("bin", "idx"):  # an index is there only when its tokens are
            for joined, prefix in zip(self.joined, self.prefixes, strict=True):
                file_of(joined, kind).rename(file_of(prefix, kind))
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def started(output: Path, prefixes: Sequence[Path], recipe: Recipe) -> Iterator[Unfinished]:
    """The working folder beside the output, for this process alone.

    It is removed where nothing in it is worth going on with. Raises DataError where another process
    builds, the folder cannot be made, or it or the output has something else.
    """
    unfinished = Unfinished(Path(f"{output}.building"), prefixes, recipe)
    folder = unfinished.folder
    with locked(folder):
        try:
            unfinished.begin()
            yield unfinished
        finally:
            if kept := unfinished.finished_parts():
                log.info("%s keeps %d finished part(s) for the next start", folder, kept)
            elif folder.exists():
                unfinished.discard()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The system frees the lock however this process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from None
    with lock:
        free = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError as why:
            log.warning("%s has no locks (%s): start one build only", folder, why.strerror)
        if not (free and os.path.exists(lock.name)):  # a build that ends removes the folder
            hint = "stop that one first, or choose another output"
            raise DataError(f"{folder} is in use by another build; {hint}")
        yield


def read_json(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None


def write_json(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)
