"""Two checkpoints, array by array: of two runs, or two steps of one, under whatever layouts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from mlm_jax.checkpoint.manager import names
from mlm_jax.checkpoint.manifest import require_whole
from mlm_jax.errors import CheckpointError

PIECE = 2**22  # elements compared at a time: some 100 MiB in float64, with what is between

Names = tuple[str, ...]  # ("params", "blocks", "mlp", "up")


class Difference(NamedTuple):
    """Of one array. largest and relative are None where shapes differ or one side has none."""

    name: str  # blocks.mlp.up; opt_state.1.mu.blocks.mlp.up
    kinds: tuple[str | None, str | None]  # float32[2,64,256] on both sides; None: not there
    equal: bool  # bit for bit
    largest: float | None = None  # max |a - b|
    relative: float | None = None  # |a - b| / |a|, 2-norms


class Arrays:
    """The arrays of one saved step, read one by one, as NumPy's: no layout, no devices.

    Raises CheckpointError where the step is damaged or no checkpoint of ours.
    """

    def __init__(self, folder: Path):
        require_whole(folder)
        self.folder, self._handler = folder, ocp.PyTreeCheckpointHandler()
        self._state: Any = folder.absolute() / "state"  # Any: declared as epath.Path
        self.kinds: dict[Names, str] = self._told(self._kinds)

    def _kinds(self) -> dict[Names, str]:
        tree = self._handler.metadata(self._state).tree
        return {
            tuple(names(path)): f"{np.dtype(x.dtype)}[{','.join(map(str, x.shape))}]"
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }

    def read(self, path: Names) -> np.ndarray:
        def restore() -> np.ndarray:
            target: Any = 0
            for name in reversed(path):
                target = {name: target}
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
            args = ocp.args.PyTreeRestore(target, restore_args=as_numpy, partial_restore=True)
            return jax.tree.leaves(self._handler.restore(self._state, args=args))[0]

        return self._told(restore)

    def _told(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as why:  # Orbax and TensorStore raise many things
            raise CheckpointError(
                f"{self.folder} cannot be read ({type(why).__name__}: {str(why)[:300]})"
            ) from why


def compare(one: Arrays, other: Arrays, *, weights_only: bool = True) -> Iterator[Difference]:
    """A Difference for each array that either has, by name; two arrays are held at a time."""
    for path in sorted(one.kinds.keys() | other.kinds.keys()):
        if weights_only and path[0] != "params":
            continue
        name = ".".join(path[1:] if path[0] == "params" else path)
        kinds = one.kinds.get(path), other.kinds.get(path)
        if None in kinds or len({str(kind).partition("[")[2] for kind in kinds}) > 1:
            yield Difference(name, kinds, equal=False)
            continue
        a, b = (arrays.read(path).reshape(-1) for arrays in (one, other))
        equal = a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8))
        yield Difference(name, kinds, equal, *((0.0, 0.0) if equal else distance(a, b)))


def distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """max |a - b| and |a - b| / |a| of flat arrays, in float64."""
    largest, squares, scale = np.zeros(3)
    with np.errstate(all="ignore"):  # numbers that are not finite are told as they are
        for i in range(0, a.size, PIECE):
            x, y = (part[i : i + PIECE].astype(np.float64) for part in (a, b))
            largest = np.maximum(largest, np.abs(x - y).max())  # which keeps a nan
            squares, scale = squares + np.sum((x - y) ** 2), scale + np.sum(x**2)
        return float(largest), float(np.sqrt(squares / scale)) if squares else 0.0
