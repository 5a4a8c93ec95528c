"""Checksums of a checkpoint's files. Orbax restores a file with a flipped byte, and says nothing.

`<step>/SHA256SUMS` has the form that coreutils read: `cd <step> && sha256sum -c SHA256SUMS`. It is
written before Orbax gives the folder its final name, so that a finished checkpoint has one. It
covers all below `<step>/state`; Orbax's own files beside that (when the save began, that it ended)
are written later, and none of them is needed to restore.
"""

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlm_jax.errors import CheckpointError

NAME = "SHA256SUMS"
SIGN = f"find state -type f -exec sha256sum {{}} + > {NAME}"  # what a person does to trust one


def write_manifest(folder: Path) -> None:
    """Writes down the files of the checkpoint in this folder as they are now."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(checksums(folder, "state").items())]
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def steps_in(checkpoints: Path) -> list[int]:
    """The steps that have a folder, oldest first; whether whole or not."""
    steps = {int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal()}
    return sorted(step for step in steps if (checkpoints / str(step)).is_dir())  # 06 is no step


def checkpoints_of(workdir: Path) -> Path:
    """The folder of the checkpoints. Raises CheckpointError where there is none."""
    if not (workdir / "checkpoints").is_dir():
        raise CheckpointError(f"{workdir} is no run: there is no {workdir / 'checkpoints'}")
    return workdir / "checkpoints"


def require_step(checkpoints: Path, step: int | None) -> int:
    """This step, or the newest for None. Raises CheckpointError where there is none."""
    steps = steps_in(checkpoints)
    if not steps:
        raise CheckpointError(f"{checkpoints} holds no checkpoint; has the run reached one yet?")
    if step is not None and step not in steps:
        raise CheckpointError(f"{checkpoints} has no step {step}; it has {steps}")
    return steps[-1] if step is None else step


def damage(folder: Path, *, read: bool = True) -> list[str]:
    """What is not as it was written, one line a file; empty if the checkpoint is whole.

    Without `read` a glance at what is there: no file but the checksums is opened.
    """
    try:
        written = _read_manifest(folder)
        if written is None:
            return [_without_manifest(folder)]
        if not written:
            return [f"{NAME} is not what was written"]
        found = checksums(folder, "state") if read else _at_a_glance(folder, written)
    except OSError as why:
        return [f"{Path(why.filename or folder).name} cannot be read ({why.strerror or why})"]
    return differences(written, found)


def differences(written: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """One line for each file whose checksum is not the one written down."""

    def what(name: str) -> str:
        if name not in found:
            return "is missing"
        return "is not what was written" if name in written else "was not written with the rest"

    names = sorted(written.keys() | found.keys())
    return [f"{name} {what(name)}" for name in names if found.get(name) != written.get(name)]


def require_whole(folder: Path) -> None:
    """Raises CheckpointError, with the names of damaged files and what can be done."""
    if wrong := damage(folder):
        sign = f"; if you trust it, (cd {shlex.quote(str(folder))} && {SIGN})"
        raise CheckpointError(
            f"{told(folder, wrong)}; copy it again from where it is whole, or remove that folder to"
            f" go on from an older step{sign if lacks_manifest(folder) else ''}"
        )


def told(folder: Path, wrong: list[str]) -> str:
    """One message of what `damage` has found."""
    if lacks_manifest(folder):
        return f"{folder} has no {NAME}: another version of mlm_jax saved it, or that file is lost"
    return f"{folder} is damaged: {shortened(wrong)}"


def shortened(wrong: list[str]) -> str:
    return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def lacks_manifest(folder: Path) -> bool:
    """Whether there is a state, and nothing to check it by."""
    return (folder / "state").is_dir() and not (folder / NAME).exists()


def set_aside_damaged(checkpoints: Path) -> tuple[int | None, list[str]]:
    """The newest step that is whole, if any. Newer ones are renamed to <step>.damaged.

    Also returns what was wrong with those. Raises CheckpointError, and renames nothing, where there
    are checkpoints and none is whole: a run must not begin anew unasked.
    """
    steps = steps_in(checkpoints)[::-1]
    whole, damaged = None, {}
    for step in steps:
        if not (wrong := damage(checkpoints / str(step))):
            whole = step
            break
        damaged[step] = told(checkpoints / str(step), wrong)
    if damaged and whole is None:
        require_whole(checkpoints / str(steps[0]))
    for step in damaged:
        aside = checkpoints / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
        (checkpoints / str(step)).rename(aside)
    return whole, list(damaged.values())


def checksums(folder: Path, part: str) -> dict[str, str]:
    """SHA-256 of each file below folder/part, by its path from folder."""
    files = files_below(folder, part)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing does not hold the interpreter
        return dict(zip(files, pool.map(lambda name: sha256(folder / name), files), strict=True))


def files_below(folder: Path, part: str) -> list[str]:
    """The files below folder/part, by their paths from folder."""
    paths = (path for path in (folder / part).rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> dict[str, str] | None:
    """Checksums by file as they were written; None: there are none; empty: they are no such list.

    Any other byte in them is damage too: a line that is no checksum, an end without a newline.
    """
    try:
        text = (folder / NAME).read_bytes().decode()  # read_text would take \r for \n
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError:
        return {}
    *lines, rest = text.split("\n")
    found = [re.fullmatch(r"([0-9a-f]{64})  (state/.+)", line) for line in lines]
    return {line[2]: line[1] for line in found if line} if all(found) and not rest else {}


def _at_a_glance(folder: Path, written: Mapping[str, str]) -> dict[str, str]:
    """What the checksums would be if all files that are there were as they were written."""
    return {name: written.get(name, "") for name in files_below(folder, "state")}


def _without_manifest(folder: Path) -> str:
    if not folder.is_dir():
        return "it is no folder"
    if not (folder / "state").is_dir():
        return f"it holds neither state nor {NAME}"
    return f"{NAME} is missing"
