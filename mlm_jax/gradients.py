"""How gradients are added up over dp and cp, where XLA is not left to see to it."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from mlm_jax.layers.watch import over_parts
from mlm_jax.layout import Layout

BATCH_AXES = ("dp", "cp")  # of its rows, and of the tokens in a row


def added_up_once(layout: Layout, microbatches: int) -> bool:
    """Whether gradients are summed over dp and cp after the last microbatch, and not after each.

    XLA, left to itself, does it after each. ZeRO-2 wants that: no device keeps a whole gradient.
    So do rules by hand that have dp split weights, or cp anything but sequences. A pipeline has a
    shard_map of its own.
    """
    sizes = layout.mesh.shape
    own = {"batch": ["dp"], "seq": ["cp"], "residual_seq": ["cp"]}
    usual = {dim: [a for a in own.get(dim, []) if sizes[a] > 1] for dim in layout.rules}
    rules = {dim: [a for a in layout.axes(dim) if a in BATCH_AXES] for dim in layout.rules}
    split = any(sizes[a] > 1 for a in BATCH_AXES) and rules == usual
    return microbatches > 1 and split and layout.zero < 2 and sizes["pp"] == 1


def over_parts_of_batch(sums: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """sums(params, total, batch) -> (loss, gradients), seen; with the rows of the batch split over
    dp and their tokens over cp by hand, every other axis as ever, and results summed at the end.

    batch: arrays [B] and [B, T], these in the order of the layout.
    """

    def here(*args: Any) -> Any:
        (loss, grads), seen = sums(*args)
        grads = jax.lax.psum(grads, "cp") if layout.context > 1 else grads
        parts = jax.tree.map(lambda g: g[None], grads)
        return jax.lax.psum(loss, BATCH_AXES), parts, over_parts(seen, BATCH_AXES)

    def whole(params: nnx.State, total: jax.Array, batch: Any) -> Any:
        own = jax.tree.map(lambda x: P(*BATCH_AXES[: x.ndim]), batch)
        apart = jax.shard_map(
            here, mesh=layout.mesh, in_specs=(P(), P(), own), out_specs=(P(), P("dp"), P()),
            axis_names=set(BATCH_AXES), check_vma=False,
        )  # fmt: skip
        loss, parts, seen = apart(params, total, batch)
        return (loss, added_up(parts, params, layout)), seen

    return whole


def added_up(parts: nnx.State, params: nnx.State, layout: Layout) -> nnx.State:
    """Sums over the first dim of `parts`, which dp splits, laid as optimizer state is.

    In the dtype of weights, float32 whatever model.dtype is. What ZeRO-1 splits is sent to where
    its optimizer state is, and only there: half of what an all-reduce sends. Each device adds its
    own shards: within a shard_map over some axes, XLA would gather a psum_scatter over the others.
    """
    own, split = (
        [x.spec for x in jax.tree.leaves(layout.shardings(params, of_optimizer=further))]
        for further in (False, True)
    )

    def add(shards: list[jax.Array]) -> list[jax.Array]:
        return [summed(x[0], *specs) for x, *specs in zip(shards, own, split, strict=True)]

    def summed(x: jax.Array, before: P, after: P) -> jax.Array:
        dim = next((i for i in range(x.ndim) if before[i] != after[i]), None)
        if dim is None:
            return jax.lax.psum(x, "dp")
        return jax.lax.psum_scatter(x, "dp", scatter_dimension=dim, tiled=True)

    by_device = jax.shard_map(
        add, mesh=layout.mesh, in_specs=([P("dp", *spec) for spec in own],), out_specs=split,
        check_vma=False,
    )  # fmt: skip
    return jax.tree.unflatten(jax.tree.structure(params), by_device(jax.tree.leaves(parts)))
