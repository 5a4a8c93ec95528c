"""A transformer block, and the scan over a stack of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.layers.attention import Attention, View
from mlm_jax.layers.cache import Cache
from mlm_jax.layers.dropout import dropout
from mlm_jax.layers.mlp import MLPS
from mlm_jax.layers.norm import NORMS
from mlm_jax.layers.watch import Seen, see
from mlm_jax.layers.weight import gathered
from mlm_jax.layout import Layout


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Under tp each half costs one all-reduce of [B, T, D] forward and one backward; with the residual
    stream split over tp (sequence parallelism) each is a reduce-scatter and an all-gather instead.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout):
        self.attention_norm = NORMS[cfg.norm](cfg)
        self.attention = Attention(cfg, layout)
        self.mlp_norm = NORMS[cfg.norm](cfg)
        self.mlp = MLPS[cfg.activation](cfg, layout)
        self.layout, self.dropout = layout, cfg.dropout

    def __call__(
        self, x_BTD: jax.Array, view: View, keys_B: jax.Array | None, cache: Cache | None,
        layer: jax.Array, seen: Seen | None = None,
    ) -> tuple[jax.Array, Cache | None]:  # fmt: skip
        with jax.named_scope("attention"):  # scopes are what a profile calls an operation
            h_BTD = gathered(self.attention_norm(x_BTD), self.layout)
            y_BTD, cache = self.attention(h_BTD, view, cache, layer)
            see(seen, "blocks.attention", y_BTD)
            x_BTD += dropout(y_BTD, self.dropout, keys_B, layer, "attention")
        with jax.named_scope("mlp"):
            y_BTD = self.mlp(gathered(self.mlp_norm(x_BTD), self.layout))
            see(seen, "blocks.mlp", y_BTD)
            x_BTD += dropout(y_BTD, self.dropout, keys_B, layer, "mlp")
        see(seen, "blocks", x_BTD)
        return x_BTD, cache


def run_blocks(
    blocks: Block, x_BTD: jax.Array, view: View, keys_B: jax.Array | None, cache: Cache | None,
    remat: str, seen: Seen | None = None,
) -> tuple[jax.Array, Cache | None]:  # fmt: skip
    """x through a stack of blocks (layers.weight.stacked): one compiled body for all of them.

    remat: what backward computes again. none: nothing. selective: norms, softmax and activations,
    not the matrix products of weights. full: the whole block from its input.
    seen: gets the sizes of what each block puts out, [L].
    """
    n_layers = blocks.mlp.down.shape[0]

    def body(carry: Any, block_and_layer: Any) -> tuple[Any, Seen | None]:
        block, layer = block_and_layer
        here: Seen | None = None if seen is None else {}
        return block(carry[0], view, keys_B, carry[1], layer, here), here

    carry, by_layer = jax.lax.scan(
        REMAT[remat](body), (x_BTD, cache), (blocks, jnp.arange(n_layers))
    )
    if seen is not None:
        seen.update(by_layer)
    return carry


REMAT = {
    "none": lambda body: body,
    "selective": partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_only_these_names("qkv", "mlp_up", "block_out"),
        prevent_cse=False,  # not needed inside a scan
    ),
    "full": partial(jax.checkpoint, prevent_cse=False),
}
