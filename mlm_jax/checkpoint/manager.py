"""Checkpoints of a run under WORKDIR/checkpoints/<step>/state, by Orbax.

A checkpoint is a tree of arrays under the names of weights, without a trace of the layout that
wrote it: any layout, on any number of devices, restores it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mlm_jax.config import CheckpointConfig
from mlm_jax.errors import CheckpointError


class Checkpoints:
    """The checkpoints of one workdir. Saves run in the background; leaving the context waits."""

    def __init__(self, workdir: Path, cfg: CheckpointConfig | None = None):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells much that is no news
        options = ocp.CheckpointManagerOptions(
            max_to_keep=cfg.keep if cfg else None, create=cfg is not None, read_only=cfg is None
        )
        self.folder = (workdir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_handlers={"state": ocp.StandardCheckpointHandler()}
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begins to save; the state may be donated as soon as this returns."""
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(named(state))))

    def restore(self, abstract: Any, step: int | None = None) -> Any:
        """The state at a step, or the newest, laid out as `abstract` says."""
        step = self._known(step)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(named(abstract)))
        with self._readable(step):
            return unnamed(abstract, self._manager.restore(step, args=args)["state"])

    def restore_params(self, abstract: Any, step: int | None = None) -> Any:
        """Only the weights of a step, laid out as `abstract` says; moments are not read."""
        step = self._known(step)
        target = {"params": named(abstract)}
        args = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )  # fmt: skip
        with self._readable(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(self.folder / str(step) / "state", args)
            return unnamed(abstract, tree["params"])

    @contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Whatever Orbax and TensorStore raise, and they raise many things, as one message."""
        try:
            yield
        except Exception as why:
            raise CheckpointError(
                f"{self.folder / str(step)} cannot be read ({type(why).__name__}:"
                f" {str(why)[:300]}); remove that folder to go on from an older step"
            ) from why

    def _known(self, step: int | None) -> int:
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise CheckpointError(
                f"{self.folder} holds no checkpoint; has the run reached one yet?"
            )
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.folder} has no step {step}; it has {steps}")
        return steps[-1] if step is None else step


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
