"""The order of tokens: in a row as they were written, or as context parallelism holds them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.layout import Layout


def in_order(rows: Any, layout: Layout) -> Any:
    """A tree of arrays [..., B, T] whose tokens are in a row, in the order of the layout instead.

    Where they are whole on each device, as tokens are, nothing is sent. Inside of a shard_map over
    cp they are in order already.
    """
    if layout.context == 1 or "cp" in layout.manual:
        return rows

    def ordered(x: jax.Array) -> jax.Array:
        lead = (None,) * (x.ndim - 2)
        return layout.constrain(x[..., layout.order(x.shape[-1])], *lead, "batch", "seq")

    return jax.tree.map(ordered, rows)


def out_of_order(x_BTD: jax.Array, layout: Layout) -> jax.Array:
    """The tokens of an array in a row again."""
    if layout.context == 1:
        return x_BTD
    return x_BTD[:, np.argsort(layout.order(x_BTD.shape[1]))]


def places(layout: Layout, length: int) -> jax.Array:
    """int32 [T] places in their row of the `length` tokens of a sequence at hand."""
    if "cp" not in layout.manual:
        return jnp.asarray(layout.order(length), jnp.int32)
    n = layout.context
    parts = jnp.asarray(layout.order(n * length), jnp.int32).reshape(n, length)
    return parts[jax.lax.axis_index("cp")]
