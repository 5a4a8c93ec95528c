"""Indices kept on a disk, so that the next start maps them into memory instead of building them.

FOLDER/NAME holds an array a file, NAME.npy, and description.json: what went in, and what came out.
NAME is a hash of all that went in, so an index never has to be updated. Of processes that want one
which is not there, the first builds it and the others wait.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

SMALLEST = 2**20  # bytes: less is built again sooner than it is looked up on a shared disk
ENDS = 2**26  # bytes
DESCRIPTION = "description.json"


def cached(
    folder: Path | None, key: Mapping[str, Any], build: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What build() gives: mapped from the folder where it is and is whole, else built and kept.

    key holds everything the arrays depend on, in what JSON can write: also a version of the
    algorithm. What is small is not kept. With no folder, or one that cannot be written, which is
    logged once, arrays are only built.
    """
    if folder is None:
        return dict(build())
    description = json.dumps(key, sort_keys=True, indent=2)
    place = folder / hashlib.sha256(description.encode()).hexdigest()[:32]
    if (found := load(place, description)) is not None:
        return found
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone(folder))
        except OSError as error:
            warn_once(str(folder), str(error))
            return dict(build())
        if (found := load(place, description)) is not None:  # by whom this one has waited for
            return found
        found = dict(build())
        if sum(array.nbytes for array in found.values()) >= SMALLEST:
            try:
                save(place, description, found)
            except OSError as error:
                warn_once(str(folder), str(error))
    return load(place, description) or found


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Others wait: of many processes that start together one builds. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        with contextlib.suppress(OSError):  # this file system has no locks: each builds
            fcntl.flock(lock, fcntl.LOCK_EX)
            for leftover in folder.glob("partial-*"):  # of one that was killed
                shutil.rmtree(leftover, ignore_errors=True)
        yield


def load(place: Path, description: str) -> dict[str, np.ndarray] | None:
    """The arrays as they were saved, or None: then something is missing or damaged."""
    try:
        saved = json.loads((place / DESCRIPTION).read_text())
        if saved["key"] != json.loads(description):
            return None
        arrays = {
            name: np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in saved["arrays"]
        }
        whole = {name: facts(array) for name, array in arrays.items()} == saved["arrays"]
    except (OSError, ValueError, KeyError, TypeError, EOFError):  # as numpy and JSON find damage
        return None
    return {name: array.view(np.ndarray) for name, array in arrays.items()} if whole else None


def save(place: Path, description: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Under the final name everything appears at once. Raises OSError."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=place.parent, prefix="partial-", ignore_cleanup_errors=True
    ) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        for name, array in arrays.items():
            np.save(new / f"{name}.npy", array)
        outcome = {name: facts(array) for name, array in arrays.items()}
        content = {"key": json.loads(description), "arrays": outcome}
        (new / DESCRIPTION).write_text(json.dumps(content, indent=2))
        try:
            new.rename(place)
        except OSError:  # something is there: another process was faster, or it is damaged
            if load(place, description) is None:
                place.rename(Path(temporary) / "old")  # whoever has it mapped keeps it
                new.rename(place)


def facts(array: np.ndarray) -> dict[str, Any]:
    """What a damaged file seldom shares; of a large one, only the ends are read."""
    raw = array.reshape(-1).view(np.uint8)
    crc32 = zlib.crc32(raw[ENDS:][-ENDS:].data, zlib.crc32(raw[:ENDS].data))
    return {"dtype": array.dtype.str, "shape": list(array.shape), "crc32": crc32}


@functools.cache
def warn_once(folder: str, why: str) -> None:
    log.warning("%s cannot keep indices, which are built at each start: %s", folder, why)
