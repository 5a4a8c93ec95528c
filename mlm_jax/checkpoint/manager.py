"""Checkpoints of a run under WORKDIR/checkpoints/<step>/state, by Orbax.

A checkpoint is a tree of arrays under the names of weights, without a trace of the layout that
wrote it: any layout, on any number of devices, restores it.
"""

import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import multihost

from mlm_jax.checkpoint.manifest import (
    require_step,
    require_whole,
    set_aside_damaged,
    write_manifest,
)
from mlm_jax.config import CheckpointConfig
from mlm_jax.distributed import LONGEST_DECISION, lead_says
from mlm_jax.errors import CheckpointError, MlmJaxError


class Checkpoints:
    """The checkpoints of one workdir. With a cfg it writes: no other process may do so meanwhile.

    Then what a killed save left behind is removed, and newer checkpoints than the newest whole one
    are set aside; `damaged` tells of those, and `whole` is the step to go on from, if any. Saves
    run in the background; leaving the context waits.
    Of several processes of one run, all open it, and each writes what its devices hold.
    """

    def __init__(self, workdir: Path, cfg: CheckpointConfig | None = None):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors reach us as exceptions
        self.folder = (workdir / "checkpoints").absolute()
        self._saving, self._bytes = 0, 0  # step and size of the newest save that was begun
        self.whole, self.damaged = None, []
        if cfg:
            self.whole, self.damaged = lead_says(lambda: tidied(self.folder))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=cfg.keep if cfg else None, create=cfg is not None, read_only=cfg is None,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._sign, barrier_sync_fn=meet,
                timeout_secs=LONGEST_DECISION // 1000,  # the checksums of a large one
            ),
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_handlers={"state": ocp.StandardCheckpointHandler()}
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            with self._writable():
                self._manager.close()  # which waits for the save
        except MlmJaxError:
            if kind is None:  # else what went wrong first is what to tell
                raise

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begins to save; the state may be donated as soon as this returns.

        Waits for the save before it. Raises MlmJaxError where that one or this one cannot be
        written, as `check` and `wait` do.
        """
        self.wait()
        self._saving, self._bytes = step, tree_bytes(state)
        args = ocp.args.Composite(state=ocp.args.StandardSave(named(state)))
        with self._writable():
            self._manager.save(step, args=args)

    def check(self) -> None:
        """Raises MlmJaxError if the save in the background has failed; does not wait for it."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until the save in the background is complete."""
        with self._writable():
            self._manager.wait_until_finished()

    def _sign(self) -> None:
        """Called by Orbax in one process, when all have written and before the final name."""
        write_manifest(self.folder / f"{self._saving}.orbax-checkpoint-tmp")

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """Whatever a save raises, here or in its thread, as one message."""
        try:
            yield
        except Exception as why:
            raise MlmJaxError(
                f"the checkpoint of step {self._saving} could not be written to {self.folder}"
                f" ({reason(why)}): it takes {gib(self._bytes)} GiB, and"
                f" {gib(shutil.disk_usage(self.folder).free)} are free there. Older checkpoints are"
                " as they were: once this one can be written, the same command goes on from them"
            ) from why

    def restore(self, abstract: Any, step: int | None = None) -> Any:
        """The state at a step, or the newest, laid out as `abstract` says."""
        step = self._settled(step)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(named(abstract)))
        with self._readable(step):
            return unnamed(abstract, self._manager.restore(step, args=args)["state"])

    def restore_params(self, abstract: Any, step: int | None = None) -> Any:
        """Only the weights of a step, laid out as `abstract` says; all its files are checked."""
        step = self._settled(step)
        target = {"params": named(abstract)}
        args = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )  # fmt: skip
        with self._readable(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(self.folder / str(step) / "state", args)
            return unnamed(abstract, tree["params"])

    def _settled(self, step: int | None) -> int:
        self.wait()
        return require_step(self.folder, step)

    @contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Whatever Orbax and TensorStore raise, and they raise many things, as one message."""
        try:
            if step != self.whole:  # which has been read through already
                require_whole(self.folder / str(step))
            yield
        except CheckpointError:
            raise
        except Exception as why:
            raise CheckpointError(
                f"{self.folder / str(step)} cannot be read ({type(why).__name__}:"
                f" {str(why)[:300]}); remove that folder to go on from an older step"
            ) from why


def meet(*, key: str, timeout_ms: int) -> None:
    """Waits for the other processes, unless this one is failing: then it has to say so instead.

    Orbax comes here from a `finally` too, where the others would never follow.
    """
    if sys.exception() is None:
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def tidied(folder: Path) -> tuple[int | None, list[str]]:
    """The newest step that is whole, and what was wrong with newer ones, which are set aside."""
    for leftover in folder.glob("*.orbax-checkpoint-tmp"):
        shutil.rmtree(leftover)
    return set_aside_damaged(folder)


def require_room(workdir: Path, abstract: Any, keep: int) -> None:
    """Raises CheckpointError where the disk cannot hold checkpoint.keep states and one more."""
    existing = next(p for p in (workdir.absolute(), *workdir.absolute().parents) if p.exists())
    held = sum(
        p.stat().st_size for p in (workdir / "checkpoints").glob("[0-9]*[0-9]/**/*") if p.is_file()
    )
    disk, size = shutil.disk_usage(existing), tree_bytes(abstract)
    free = disk.free + held
    if disk.total and free < size * (keep + 1):  # some network file systems do not say
        fits = int(free / size) - 1
        hint = f"checkpoint.keep={fits}, or " if fits > 0 else ""
        raise CheckpointError(
            f"checkpoint.keep={keep} takes {keep + 1} times {gib(size)} GiB, one while it is"
            f" written, and the disk of {workdir} has {gib(free)}; try {hint}a larger disk"
        )


def reason(why: Exception) -> str:
    """'No space left on device', where the system said so; TensorStore hides it in its text."""
    found = re.search(r"os_error_code='(\d+)'", str(why))
    number = int(found[1]) if found else getattr(why, "errno", None)
    return os.strerror(number) if number else f"{type(why).__name__}: {str(why)[:300]}"


def tree_bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gib(n: int) -> str:
    return f"{n / 2**30:.3g}"


def named(tree: Any) -> dict:
    """The arrays of a tree as nested dicts under the names on their paths."""
    nested: dict = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *most, last = names(path)
        part = nested
        for name in most:
            part = part.setdefault(name, {})
        part[last] = leaf
    return nested


def unnamed(like: Any, nested: dict) -> Any:
    """The inverse of `named`, for a tree of the same structure as `like`."""

    def find(path: tuple, _: Any) -> Any:
        part: Any = nested
        for name in names(path):
            part = part[name]
        return part

    return jax.tree_util.tree_map_with_path(find, like)


def names(path: tuple) -> list[str]:
    """['opt_state', '1', 'mu', 'blocks', 'mlp', 'up']; the key of a Variable's value is no name."""
    parts = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path]
    return [str(part) for part in parts if part != "value"]
