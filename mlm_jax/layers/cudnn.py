"""cuDNN's attention, also within a shard_map that splits only some of the mesh axes by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from mlm_jax.layers.blockwise import Formula
from mlm_jax.layout import Layout


def cudnn_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, formula: Formula, layout: Layout
) -> jax.Array:
    """softmax(scale q k^T) v, [B, T, N, H], by cuDNN's kernel: bfloat16, without a mask."""
    kernel = partial(
        jax.nn.dot_product_attention, scale=formula.scale, is_causal=formula.causal,
        local_window_size=formula.window and (formula.window - 1, 0), implementation="cudnn",
    )  # fmt: skip
    attend = by_device(kernel, layout) if layout.manual else kernel
    return attend(q_BTNH, k_BSKH, v_BSKH)


def by_device(kernel: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """The kernel in a shard_map over the axes that are not split by hand yet.

    JAX partitions a call of cuDNN over all axes of a mesh or over none: with some of them split by
    hand, compiling fails (0.10 to 0.12). Nor can a shard_map within another one be differentiated
    inside a scan. So backward is a shard_map of its own, which runs the kernel forward again: one
    forward more where remat is none, and none where it is not.
    """
    rest = set(layout.mesh.axis_names) - set(layout.manual)
    heads = layout.spec("batch", None, "heads", None)

    def over_rest(f: Callable[..., Any], n: int) -> Callable[..., Any]:
        return jax.shard_map(
            f, in_specs=(heads,) * n, out_specs=heads, axis_names=rest, check_vma=False
        )

    def forward(*qkv: jax.Array) -> jax.Array:
        return over_rest(kernel, 3)(*qkv)

    def backward(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        return jax.vjp(kernel, q, k, v)[1](g)

    attend = jax.custom_vjp(forward)
    attend.defvjp(lambda *qkv: (forward(*qkv), qkv), lambda qkv, g: over_rest(backward, 4)(*qkv, g))
    return attend
