"""What a run watches on request: norms of weights by group, and the size of activations.

All of it is computed inside the compiled step and read by nothing there, behind optimization
barriers: the numbers of training are the same bits with and without. A group is a weight's path;
where layers are stacked it has a number for each.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.layout import is_weight, path_name


class Size(NamedTuple):
    """How large an activation is: each float32 [], or [L] where layers are stacked."""

    mean_abs: jax.Array
    mean_square: jax.Array
    largest: jax.Array


Seen = dict[str, Size]  # by the name of the activation; None instead of a dict: nobody watches


def see(seen: Seen | None, name: str, x: jax.Array) -> None:
    """Notes the size of x, if anybody watches."""
    if seen is None:
        return
    x = jax.lax.optimization_barrier(jax.lax.stop_gradient(x)).astype(jnp.float32)
    size = jnp.abs(x)
    seen[name] = Size(size.mean(), jnp.square(size).mean(), size.max())


def both(a: Seen, b: Seen) -> Seen:
    """Of two microbatches: means are added up, to be divided by their number at the end."""
    return {
        name: Size(
            x.mean_abs + b[name].mean_abs,
            x.mean_square + b[name].mean_square,
            jnp.maximum(x.largest, b[name].largest),
        )
        for name, x in a.items()
    }


def over_parts(seen: Seen, axes: tuple[str, ...]) -> Seen:
    """Of a batch, from what each device of a shard_map over these axes saw of its own part."""
    return {
        name: Size(
            jax.lax.pmean(x.mean_abs, axes),
            jax.lax.pmean(x.mean_square, axes),
            jax.lax.pmax(x.largest, axes),
        )
        for name, x in seen.items()
    }


def activation_sizes(seen: Seen, microbatches: int) -> dict[str, dict[str, jax.Array]]:
    return {
        "activation_mean_abs": {name: x.mean_abs / microbatches for name, x in seen.items()},
        "activation_rms": {
            name: jnp.sqrt(x.mean_square / microbatches) for name, x in seen.items()
        },
        "activation_max": {name: x.largest for name, x in seen.items()},
    }


def group_norms(grads: Any, updates: Any, params: Any) -> dict[str, dict[str, jax.Array]]:
    """Norms of the weights in each tree, by path: float32 [], or [L] where layers are stacked."""
    trees = {"grad_norms": grads, "update_norms": updates, "param_norms": params}
    return {name: _norms(tree) for name, tree in trees.items()}


def _norms(tree: Any) -> dict[str, jax.Array]:
    norms = {}
    for path, w in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weight):
        square = jnp.square(jax.lax.optimization_barrier(w[...]))
        stacked = w.get_metadata()["out_sharding"][0] == "layer"
        axes = tuple(range(1, square.ndim)) if stacked else None
        norms[path_name(path)] = jnp.sqrt(square.sum(axes))
    return norms


def as_row(watched: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Fields of a row of metrics: a number for each group, and under by_layer those of its layers.

    Over layers, norms add up as squares, mean |x| is averaged, and the largest stays the largest.
    """
    layers = {kind: {k: x for k, x in group.items() if x.ndim} for kind, group in watched.items()}
    whole = {kind: {k: OVER_LAYERS[kind](x) for k, x in g.items()} for kind, g in watched.items()}
    return {**whole, "by_layer": layers} if watched else {}


def _norm(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(x).sum())


OVER_LAYERS = {
    "grad_norms": _norm,
    "update_norms": _norm,
    "param_norms": _norm,
    "activation_mean_abs": np.mean,
    "activation_rms": lambda x: np.sqrt(np.square(x).mean()),
    "activation_max": np.max,
}
