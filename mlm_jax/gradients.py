"""How gradients are added up over dp, where XLA is not left to see to it."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from mlm_jax.layers.watch import over_parts
from mlm_jax.layout import Layout


def added_up_once(layout: Layout, microbatches: int) -> bool:
    """Whether gradients are summed over dp after the last microbatch, and not after each.

    XLA, left to itself, does it after each. ZeRO-2 wants that: no device keeps a whole gradient.
    So does a rule by hand that has dp split weights.
    """
    sizes = layout.mesh.shape
    alone = sizes["pp"] == sizes["cp"] == 1  # these have shard_maps of their own
    batches_alone = [dim for dim in layout.rules if "dp" in layout.axes(dim)] == ["batch"]
    return microbatches > 1 and batches_alone and layout.zero < 2 and alone


def over_dp(sums: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """sums(params, total, batch) -> (loss, gradients), seen; with the rows of the batch split
    over dp by hand, every other axis as ever, and the results summed over dp at the end.
    """

    def here(*args: Any) -> Any:
        (loss, grads), seen = sums(*args)
        parts = jax.tree.map(lambda g: g[None], grads)
        return jax.lax.psum(loss, "dp"), parts, over_parts(seen, "dp")

    apart = jax.shard_map(
        here, mesh=layout.mesh, in_specs=(P(), P(), P("dp")), out_specs=(P(), P("dp"), P()),
        axis_names={"dp"}, check_vma=False,
    )  # fmt: skip

    def whole(params: nnx.State, *rest: Any) -> Any:
        loss, parts, seen = apart(params, *rest)
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
