"""Folders that are there whole or not at all: built aside, renamed at the end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlm_jax.checkpoint.manager import gib
from mlm_jax.errors import CheckpointError, MlmJaxError


def require_new(folder: Path, size: int) -> None:
    """Raises CheckpointError where folder holds something, or its disk has no room for size."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there already; give a folder that is new or empty")
    parent = next(p for p in folder.absolute().parents if p.exists())
    disk = shutil.disk_usage(parent)
    if disk.total and disk.free < size:  # some network file systems do not say
        raise CheckpointError(
            f"{folder} takes {gib(size)} GiB, and its disk has {gib(disk.free)}; try a larger disk"
        )


@contextmanager
def built_aside(folder: Path) -> Iterator[Path]:
    """A folder to build in, which then becomes `folder`; if building fails, nothing stays.

    Raises MlmJaxError where files cannot be written.
    """
    folder = folder.absolute()
    aside = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        if folder.exists():
            folder.rmdir()
        os.replace(aside, folder)
    except OSError as why:
        raise MlmJaxError(f"{folder} could not be written: {why.strerror or why}") from why
    finally:
        shutil.rmtree(aside, ignore_errors=True)
