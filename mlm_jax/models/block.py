"""A transformer block, and the scan over a stack of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.layers.attention import Attention, View
from mlm_jax.layers.cache import Cache
from mlm_jax.layers.dropout import dropout
from mlm_jax.layers.mlp import Mlp
from mlm_jax.layers.norm import NORMS
from mlm_jax.layers.watch import Seen, see
from mlm_jax.layers.weight import gathered
from mlm_jax.layout import Layout

Norm = Callable[[jax.Array], jax.Array]
Norms = tuple[Norm | None, Norm | None]  # of what a half of a block reads, and of what it gives


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    parallel: x + attention(h) + mlp(h), where h = norm(x) (Chowdhery et al. 2022); or with a norm
    for each of the two (Black et al. 2022). norm_placement: post: norm(x + attention(x)), then
    norm(x + mlp(x)) (Vaswani et al. 2017); both: x + norm(attention(norm(x))), and so on (Gemma 2).

    Under tp each half costs one all-reduce of [B, T, D] forward and one backward; with the residual
    stream split over tp (sequence parallelism) each is a reduce-scatter and an all-gather instead.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout, causal: bool | None = None):
        norm = NORMS[cfg.norm]
        self.attention_norm = norm(cfg, residual=cfg.d_model)
        self.attention = Attention(cfg, layout, causal)
        one_norm = cfg.parallel and cfg.parallel_norms == 1
        self.mlp_norm = None if one_norm else norm(cfg, residual=cfg.d_model)
        self.mlp = Mlp(cfg, layout)
        both = cfg.norm_placement == "both"
        self.attention_out_norm = norm(cfg, residual=cfg.d_model) if both else None
        self.mlp_out_norm = norm(cfg, residual=cfg.d_model) if both else None
        self.cfg, self.layout, self.post = cfg, layout, cfg.norm_placement == "post"

    def __call__(
        self, x_BTD: jax.Array, view: View, keys_B: jax.Array | None, cache: Cache | None,
        layer: jax.Array, seen: Seen | None = None,
    ) -> tuple[jax.Array, Cache | None]:  # fmt: skip
        def read(x_BTD: jax.Array, norm: Norm) -> jax.Array:
            return gathered(x_BTD if self.post else norm(x_BTD), self.layout)

        def add(x_BTD: jax.Array, y_BTD: jax.Array, site: str, norms: Norms) -> jax.Array:
            norm, out_norm = norms
            see(seen, f"blocks.{site}", y_BTD)
            y_BTD = y_BTD if out_norm is None else out_norm(y_BTD)
            y_BTD = dropout(y_BTD, self.cfg.dropout, keys_B, view.places_T, layer, site)
            scale = self.cfg.residual_scale
            x_BTD = x_BTD + (y_BTD if scale == 1 else scale * y_BTD)
            return norm(x_BTD) if self.post and norm is not None else x_BTD

        with jax.named_scope("attention"):  # scopes are what a profile calls an operation
            h_BTD, before_BTD = read(x_BTD, self.attention_norm), x_BTD
            y_BTD, cache = self.attention(h_BTD, view, cache, layer)
            x_BTD = add(x_BTD, y_BTD, "attention", (self.attention_norm, self.attention_out_norm))
        x_BTD = self.between(x_BTD, view, layer, read, add)
        with jax.named_scope("mlp"):
            if self.mlp_norm is not None:
                h_BTD = read(before_BTD if self.cfg.parallel else x_BTD, self.mlp_norm)
            x_BTD = add(x_BTD, self.mlp(h_BTD), "mlp", (self.mlp_norm, self.mlp_out_norm))
        see(seen, "blocks", x_BTD)
        return x_BTD, cache

    def between(
        self, x_BTD: jax.Array, view: View, layer: jax.Array, read: Any, add: Any
    ) -> jax.Array:
        """What stands between the halves: nothing. `read` and `add` are those of the block."""
        return x_BTD


def run_blocks(
    blocks: Block, x_BTD: jax.Array, view: View, keys_B: jax.Array | None, cache: Cache | None,
    remat: str, seen: Seen | None = None, first: jax.Array | int = 0,
) -> tuple[jax.Array, Cache | None]:  # fmt: skip
    """x through a stack of blocks (layers.weight.stacked): one compiled body for all of them.

    remat: what backward computes again. none: nothing. selective: norms, softmax and activations,
    not the matrix products of weights. full: the whole block from its input.
    seen: gets the sizes of what each block puts out, [L].
    first: the number of the first of these blocks in the model.
    """
    n_layers = blocks.mlp.down.shape[0]

    def body(carry: Any, block_and_layer: Any) -> tuple[Any, Seen | None]:
        block, layer = block_and_layer
        here: Seen | None = None if seen is None else {}
        return block(carry[0], view, keys_B, carry[1], layer, here), here

    carry, by_layer = jax.lax.scan(
        REMAT[remat](body), (x_BTD, cache), (blocks, first + jnp.arange(n_layers))
    )
    if seen is not None:
        seen.update(by_layer)
    return carry


def run_apart(
    blocks: Sequence[Block], x_BTD: jax.Array, view: View, caches: tuple[Cache, ...]
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """x through blocks that have their own weights and caches each (layers.weight.unstacked)."""
    written = []
    for number, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
        x_BTD, cache = block(x_BTD, view, None, cache, jnp.int32(number))
        written.append(cache)
    return x_BTD, tuple(written)


KEPT = ("qkv", "attention", "mlp_up", "block_out")
REMAT = {
    "none": lambda body: body,
    "selective": partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_only_these_names(*KEPT),
        prevent_cse=False,  # not needed inside a scan
    ),
    "full": partial(jax.checkpoint, prevent_cse=False),
}
