"""OUTPUT.building: the folder of a build that is not whole yet, from which a later start goes on.

lock             held by the one process that builds
manifest.json    what all parts have in common
NAME_K.bin, .idx, NAME.json     a finished part under the K-th key, and its record
stream-N         lines of a stream that are being read
joined_K.bin, .idx, joined.json     all parts, before they get their final names
"""

import contextlib
import fcntl
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from mlm_jax.data.indexed import IndexedDataset, file_of
from mlm_jax.data.indexed_writer import IndexedWriter
from mlm_jax.data.preprocess.encoding import Counts, Recipe
from mlm_jax.data.preprocess.inputs import Part
from mlm_jax.errors import DataError

log = logging.getLogger(__name__)

FORMAT = 1


class Building:
    """The working folder, locked and checked. Use it through `opened`."""

    def __init__(self, folder: Path, prefixes: Sequence[Path], recipe: Recipe):
        self.folder, self.prefixes, self.recipe = folder, list(prefixes), recipe

    def begin(self, common: dict[str, Any]) -> None:
        """Refuses what was left by a build of something else."""
        manifest = self.folder / "manifest.json"
        there = read_json(manifest)
        if there and there != common and self.finished_parts():
            differ = [
                f"{key} was {there.get(key)!r} and is {value!r}"
                for key, value in common.items() if there.get(key) != value
            ]  # fmt: skip
            raise DataError(
                f"{self.folder} has {self.finished_parts()} finished parts of another build: "
                f"{'; '.join(differ)}. Set these back to go on with it, or remove the folder"
            )
        for leftover in [*self.folder.glob("*.partial-*"), *self.folder.glob("stream-*")]:
            leftover.unlink()
        write_json(manifest, common)

    def check_output(self) -> None:
        for file in (file_of(prefix, kind) for prefix in self.prefixes for kind in ("bin", "idx")):
            if file.exists():
                raise DataError(f"{file}: already exists; remove it or choose another output")

    def finished_parts(self) -> int:
        return sum(f.name not in ("manifest.json", "joined.json") for f in self.records())

    def records(self) -> list[Path]:
        return list(self.folder.glob("*.json"))

    def part_prefixes(self, part: Part) -> list[str]:
        return [str(self.folder / f"{part.name}_{k}") for k in range(len(self.prefixes))]

    def finish(self, part: Part, counts: Counts, problems: Sequence[str]) -> None:
        """A part that has its record is whole."""
        limit = self.recipe.max_document_bytes
        content = {"counts": counts, "max_document_bytes": limit, "problems": problems}
        write_json(self.folder / f"{part.name}.json", content)

    def finished(self, part: Part) -> Counts | None:
        """What was written of this part, if it would be the same today."""
        record = read_json(self.folder / f"{part.name}.json")
        if record is None:
            return None
        counts, limit = Counts(*record["counts"]), record["max_document_bytes"]
        now = self.recipe.max_document_bytes
        same = limit <= now if not counts.skipped else limit == now
        if not same or (counts.skipped and self.recipe.on_error == "stop"):
            return None
        return counts

    def join(
        self, parts: Sequence[Part], files: Sequence[str], counts: Counts, pause: Callable[[], None]
    ) -> None:
        """Puts the parts together and gives them their final names; pause may raise."""
        for k in range(len(self.prefixes)):
            first = self.part_prefixes(parts[0])[k]
            with IndexedWriter(self.folder / f"joined_{k}", IndexedDataset(first).dtype) as writer:
                for part in parts:
                    pause()
                    writer.add_dataset(self.part_prefixes(part)[k])
        write_json(self.folder / "joined.json", {"counts": counts, "inputs": files})
        self.publish(files)

    def publish(self, files: Sequence[str]) -> Counts | None:
        """Gives joined files their final names, also where an earlier start was killed in it."""
        joined = read_json(self.folder / "joined.json")
        if joined is None:
            return None
        if joined["inputs"] != list(files):
            raise DataError(
                f"{self.folder} has a finished build of {' '.join(joined['inputs'])}, which only"
                " needs its names: start that one again, or remove the folder"
            )
        for kind in ("bin", "idx"):  # an index is there only when its tokens are
            for k, prefix in enumerate(self.prefixes):
                if (source := file_of(self.folder / f"joined_{k}", kind)).exists():
                    source.rename(file_of(prefix, kind))
        self.discard()
        return Counts(*joined["counts"])

    def leave(self) -> None:
        """Keeps what is worth going on with."""
        if not (kept := self.finished_parts()):
            return self.discard()
        log.info("%s keeps %d finished part(s) for the next start", self.folder, kept)

    def discard(self) -> None:
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def opened(output: Path, prefixes: Sequence[Path], recipe: Recipe) -> Iterator[Building]:
    """The working folder beside the output, for this process alone.

    It is removed where nothing in it is worth going on with. Raises DataError where another process
    builds, or the folder cannot be made.
    """
    building = Building(Path(f"{output}.building"), prefixes, recipe)
    with locked(building.folder):
        try:
            yield building
        finally:
            if building.folder.exists():
                building.leave()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The system frees the lock however this process ends."""
    while True:
        file = open_lock(folder)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                who = file.read().strip() or "another process"
                raise DataError(
                    f"{folder} is in use by {who}; stop that build first, or choose another output"
                ) from None
            except OSError as why:
                log.warning("%s has no locks (%s): start one build only", folder, why.strerror)
            if is_there(file, folder / "lock"):  # else whoever held it has removed the folder
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}\n")
                file.flush()
                yield
                return


def open_lock(folder: Path) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / "lock").open("a+")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from None


def is_there(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def read_json(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None


def write_json(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)
