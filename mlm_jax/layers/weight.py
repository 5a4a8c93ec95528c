"""Declaring weights, and giving them their first values.

A module's constructor only declares: each weight is a shape, the names of its dims, and how it
starts. So a model of any size is made in milliseconds without memory, stacking its layers is adding
a dim to shapes, and a weight's first value depends on its path and the seed alone: not on the
layout, not on whether layers are stacked, not on which other weights there are.
"""

import dataclasses
import re
import zlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.errors import LayoutError
from mlm_jax.layout import Layout, is_weight, path_name

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Normal:
    """Starts as N(0, std^2)."""

    std: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return self.std * jax.random.normal(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Constant:
    value: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


def weight(cfg: ModelConfig, init: Normal | Constant, **dims: int) -> nnx.Param:
    """weight(cfg, Normal(0.02), embed=D, mlp=F) declares a [D, F] weight that knows its dims."""
    shape = jax.ShapeDtypeStruct(tuple(dims.values()), cfg.wide_dtype)
    return nnx.Param(shape, out_sharding=tuple(dims), eager_sharding=False, init=init)


def bias(cfg: ModelConfig, wanted: bool, **dims: int) -> nnx.Param | None:
    """A vector that starts at 0, or None where a model has none."""
    return weight(cfg, Constant(0.0), **dims) if wanted else None


def wide(dtype: Any) -> Any:
    """Of sums over values of this dtype: float32, or float64."""
    return jnp.promote_types(dtype, jnp.float32)


def linear(x: jax.Array, w: nnx.Param, b: nnx.Param | None) -> jax.Array:
    """x [..., I] times w [I, O] plus b [O], in x's dtype."""
    y = product(x, w[...].astype(x.dtype))
    return y if b is None else y + b[...].astype(x.dtype)


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., I] @ w [I, O]; for the gradient of w the smaller of x and g is turned over.

    XLA:CPU copies the transposed operand, which for a wide one takes as long as the product.
    """
    return x @ w


def _product_bwd(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    tokens = tuple(range(x.ndim - 1))
    over_tokens = lambda a, b: jax.lax.dot_general(a, b, ((tokens, tokens), ((), ())))  # noqa: E731
    narrow = x.shape[-1] <= g.shape[-1]
    return g @ w.T, over_tokens(x, g) if narrow else over_tokens(g, x).T


product.defvjp(lambda x, w: (x @ w, (x, w)), _product_bwd)


def linear_out(x_BTI: jax.Array, w: nnx.Param, b: nnx.Param | None, layout: Layout) -> jax.Array:
    """The linear layer that writes to the residual stream [B, T, D]: sums over tp, then splits.

    Where the residual stream is split over tp the two together are one reduce-scatter; the bias
    comes after it, since between the two it would keep XLA from seeing that.
    """
    y_BTD = layout.constrain(linear(x_BTI, w, None), "batch", "seq", None)
    y_BTD = layout.constrain(y_BTD, "batch", "residual_seq", None)
    return y_BTD if b is None else y_BTD + b[...].astype(x_BTI.dtype)


def gathered(h_BTD: jax.Array, layout: Layout) -> jax.Array:
    """A normed value of the residual stream with its whole sequence, as linear layers read it."""
    if layout.axes("residual_seq") != layout.axes("seq"):
        h_BTD = layout.constrain(h_BTD, "batch", "residual_seq", None)
        h_BTD = jax.lax.optimization_barrier(h_BTD)  # or XLA gathers the norm's float32 value
    return layout.constrain(h_BTD, "batch", "seq", None)


def stacked(block: M, n_layers: int) -> M:
    """`block` declared n_layers times: each weight gains a first dim, `layer`, to scan over."""

    def stack(w: nnx.Param) -> nnx.Variable:
        shape = jax.ShapeDtypeStruct((n_layers, *w.shape), w.dtype)
        return w.replace(shape, out_sharding=("layer", *w.get_metadata()["out_sharding"]))

    return jax.tree.map(stack, block, is_leaf=is_weight)


def unstacked(blocks: M) -> list[M]:
    """The blocks of a stack, each with its own weights."""

    def layer(number: int) -> M:
        def one(w: nnx.Variable) -> nnx.Variable:
            return w.replace(w[...][number], out_sharding=w.get_metadata()["out_sharding"][1:])

        return jax.tree.map(one, blocks, is_leaf=is_weight)

    return [layer(n) for n in range(jax.tree.leaves(blocks)[0].shape[0])]


def materialise(params: nnx.State, seed: int) -> nnx.State:
    """First values of declared weights: of each, a function of (seed, path, layer) only."""

    def first_value(path: tuple, w: nnx.Param) -> nnx.Variable:
        meta = w.get_metadata()
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path_name(path).encode()))
        if meta["out_sharding"][0] != "layer":
            return w.replace(meta["init"](key, w.shape, w.dtype))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(w.shape[0]))
        return w.replace(jax.vmap(lambda k: meta["init"](k, w.shape[1:], w.dtype))(keys))

    return jax.tree_util.tree_map_with_path(first_value, params, is_leaf=is_weight)


def renamed(params: nnx.State, layout: Layout) -> nnx.State:
    """The same weights with the dims that layout.weights gives them; `layer` need not be said.

    Raises LayoutError for a regex that matches no weight.
    """
    used = set()

    def rename(path: tuple, w: nnx.Param) -> nnx.Variable:
        dims, name = w.get_metadata()["out_sharding"], path_name(path)
        for regex, new in layout.weights:
            if re.fullmatch(rf"(.*\.)?({regex})", name):
                used.add(regex)
                dims = ("layer", *new) if dims[0] == "layer" and "layer" not in new else new
        return w.replace(out_sharding=dims)

    named = jax.tree_util.tree_map_with_path(rename, params, is_leaf=is_weight)
    if idle := [regex for regex, _ in layout.weights if regex not in used]:
        raise LayoutError(f"layout.weights: no weight is called {idle}; `explain` lists them")
    return named


def weight_names(params: Any) -> list[str]:
    """'blocks.mlp.up' of every weight, in the order of jax.tree.leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
    return [path_name(path) for path, _ in leaves]
