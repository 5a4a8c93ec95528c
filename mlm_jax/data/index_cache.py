"""Indices kept on a disk, so that the next start maps them into memory instead of building them.

FOLDER/NAME holds an array a file, NAME.npy, and description.json: what went in, and what came out.
NAME is a hash of all that went in, so an index never has to be updated, and any number of processes
may build the same at once: each writes a folder of its own and the first to finish gives it NAME.
"""

import functools
import hashlib
import json
import logging
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

SMALLEST = 2**20  # bytes: less is built again sooner than it is looked up on a shared disk
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
    found = load(place, description)
    if found is None:
        found = dict(build())
        if sum(array.nbytes for array in found.values()) >= SMALLEST:
            failure = None
            try:
                save(place, description, found)
            except OSError as error:  # or another process was faster, which is as good
                failure = error
            kept = load(place, description)
            if kept is None:
                warn_once(str(folder), str(failure or "what was written there reads differently"))
            found = kept or found
    return found


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
    crc32 = zlib.crc32(np.ascontiguousarray(array).data)
    return {"dtype": array.dtype.str, "shape": list(array.shape), "crc32": crc32}


@functools.cache
def warn_once(folder: str, why: str) -> None:
    log.warning("%s cannot keep indices, which are built at each start: %s", folder, why)
