"""Looking up rows of a table, with a gradient that stays where the table's rows are."""

import jax
import jax.numpy as jnp

from mlm_jax.layers.weight import wide
from mlm_jax.layout import Layout


def looked_up(
    table_VD: jax.Array, ids_BT: jax.Array, layout: Layout, rows: str | None
) -> jax.Array:
    """table[ids], [B, T, D]. rows: the dim of the table's rows, None if no axis splits them.

    Its gradient is a scatter, whose operands XLA gathers from all devices where a shard_map splits
    some axes by hand: all tokens of the batch. There each device adds up its own tokens instead.
    """
    if not layout.manual:
        return table_VD[ids_BT]
    shape, dtype = table_VD.shape, table_VD.dtype
    size = shape[0] // layout.ways(rows) if rows else shape[0]

    def own(ids_BT: jax.Array, g_BTD: jax.Array) -> jax.Array:
        """A device's tokens, in its part of the table; then summed over the parts of the batch."""
        part = 0
        for axis in layout.axes(rows):
            part = part * layout.mesh.shape[axis] + jax.lax.axis_index(axis)
        at_BT = ids_BT - part * size
        at_BT = jnp.where((at_BT >= 0) & (at_BT < size), at_BT, size)  # others are dropped
        sums = jnp.zeros((size, shape[1]), wide(dtype)).at[at_BT].add(g_BTD, mode="drop")
        return jax.lax.psum(sums, layout.axes("batch")).astype(dtype)

    def backward(ids_BT: jax.Array, g_BTD: jax.Array) -> tuple[jax.Array, None]:
        by_device = jax.shard_map(
            own, in_specs=(layout.spec("batch", None), layout.spec("batch", None, None)),
            out_specs=layout.spec(rows, None), check_vma=False,
            axis_names=set(layout.mesh.axis_names) - set(layout.manual),
        )  # fmt: skip
        return by_device(ids_BT, g_BTD), None

    look = jax.custom_vjp(lambda table_VD, ids_BT: table_VD[ids_BT])
    look.defvjp(lambda table_VD, ids_BT: (table_VD[ids_BT], ids_BT), backward)
    return look(table_VD, ids_BT)
