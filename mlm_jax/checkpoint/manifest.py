"""Checksums of a checkpoint's files. Orbax restores a file with a flipped byte, and says nothing.

`<step>/SHA256SUMS` has the form that coreutils read: `cd <step> && sha256sum -c SHA256SUMS`. It is
written before Orbax gives the folder its final name, so that a finished checkpoint has one.
"""

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlm_jax.errors import CheckpointError

NAME = "SHA256SUMS"


def write_manifest(folder: Path) -> None:
    """Writes down the files of the checkpoint in this folder as they are now."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(checksums(folder).items())]
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def damage(folder: Path) -> list[str]:
    """What is not as it was written, one line a file; empty if the checkpoint is whole."""
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return [f"{NAME} is missing or no text"]
    written = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = checksums(folder)
    return [
        f"{name} {'is not what was written' if name in found else 'is missing'}"
        for name in sorted(written.keys() | found.keys())
        if found.get(name) != written.get(name)
    ]


def require_whole(folder: Path) -> None:
    """Raises CheckpointError, with the names of damaged files and what can be done."""
    if wrong := damage(folder):
        raise CheckpointError(
            f"{folder} is damaged: {told(wrong)}; copy it again from where it is whole, or remove"
            " that folder to go on from an older step"
        )


def set_aside_damaged(checkpoints: Path) -> tuple[int | None, list[str]]:
    """The newest step that is whole, if any. Newer ones are renamed to <step>.damaged.

    Also returns what was wrong with those. Raises CheckpointError, and renames nothing, where there
    are checkpoints and none is whole: a run must not begin anew unasked.
    """
    steps = sorted((int(p.name) for p in checkpoints.glob("*") if p.name.isdecimal()), reverse=True)
    whole, damaged = None, {}
    for step in steps:
        if not (wrong := damage(checkpoints / str(step))):
            whole = step
            break
        damaged[step] = f"{checkpoints / str(step)} is damaged: {told(wrong)}"
    if damaged and whole is None:
        require_whole(checkpoints / str(steps[0]))
    for step in damaged:
        aside = checkpoints / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
        (checkpoints / str(step)).rename(aside)
    return whole, list(damaged.values())


def told(wrong: list[str]) -> str:
    return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below folder/state, by its path from folder."""
    files = [path for path in (folder / "state").rglob("*") if path.is_file()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing does not hold the interpreter
        digests = list(pool.map(sha256, files))
    return {path.relative_to(folder).as_posix(): d for path, d in zip(files, digests, strict=True)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
