"""BERT (Devlin et al. 2019): an encoder that reads both ways and tells hidden words.

With norms after the sums of blocks (norm_placement "post"), as published, or before (Megatron-LM's,
Shoeybi et al. 2019, section 5.3). Beside the words it may tell by its first token whether two
segments are in order: of other texts as published, swapped as in Megatron-LM.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.layers.embedding import Head
from mlm_jax.layers.mlp import ACTIVATIONS
from mlm_jax.layers.norm import NORMS
from mlm_jax.layers.order import in_order, out_of_order
from mlm_jax.layers.weight import Normal, bias, linear, weight, wide
from mlm_jax.layout import Layout
from mlm_jax.models.gpt import Gpt


class Bert(Gpt):
    """Gpt's embedding and blocks, with a head for hidden words, and one for the order."""

    def __init__(self, cfg: ModelConfig, layout: Layout, remat: str = "none"):
        super().__init__(cfg, layout, remat)
        self.head = Head(cfg, layout, biased=cfg.mlm_head)
        self.transform = Transform(cfg) if cfg.mlm_head else None
        self.pooler = Dense(cfg, residual=cfg.d_model) if cfg.pooler else None
        self.order = Dense(cfg, order=2) if cfg.order_head else None

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tokens_BT: jax.Array, mask: jax.Array | None = None,
        token_types: jax.Array | None = None, rngs: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """Logits float32 [B, T, V] of the token at each place; the others as in `states`."""
        h_BTD = self._states(tokens_BT, mask, token_types, rngs)
        return out_of_order(self.logits(h_BTD)[..., : self.cfg.vocab_size], self.layout)

    def states(
        self, tokens_BT: jax.Array, mask: jax.Array | None = None,
        token_types: jax.Array | None = None, rngs: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """Last hidden states [B, T, D] in model.dtype, before the transform of the head.

        tokens int32 [B, T]. mask [B, T]: 0 or False is padding, which no other token sees; None:
        there is none. token_types int32 [B, T], below model.token_types; None: all 0. rngs: dropout
        keys [B], one a sample; None: no dropout.
        """
        return out_of_order(self._states(tokens_BT, mask, token_types, rngs), self.layout)

    def _states(
        self, tokens_BT: jax.Array, mask: jax.Array | None, types_BT: jax.Array | None,
        rngs: jax.Array | None,
    ) -> jax.Array:  # fmt: skip
        """In the order of the layout."""
        segments_BT = None if mask is None else jnp.asarray(mask, jnp.int32)
        rows = {"tokens": tokens_BT, "segments": segments_BT, "types": types_BT}
        return self.read(in_order(rows, self.layout), rngs)

    def logits(self, h_BTD: jax.Array) -> jax.Array:
        return super().logits(self.transformed(h_BTD))

    def transformed(self, h_BTD: jax.Array) -> jax.Array:
        if self.transform is None:
            return h_BTD
        with jax.named_scope("transform"):
            h_BTD = self.transform(h_BTD)
            return self.layout.constrain(h_BTD, "batch", "residual_seq", None)

    def pooled(self, h_BTD: jax.Array) -> jax.Array:
        """tanh of a layer, of the first token of each row's states [B, T, D]: [B, D]."""
        assert self.pooler is not None  # see model.pooler
        h_BD = self.layout.constrain(h_BTD[:, 0], "batch", None)
        return jnp.tanh(self.pooler(h_BD))

    def order_logits(self, pooled_BD: jax.Array) -> jax.Array:
        """float32 [B, 2]: whether the segments are in order, and whether they are not."""
        assert self.order is not None  # see model.order_head
        return self.order(pooled_BD.astype(wide(pooled_BD.dtype)))

    def order_nats(self, h_BTD: jax.Array, swapped_B: jax.Array) -> jax.Array:
        """float32 [B]: -log p(whether the segments of a row were swapped), by its states.

        Where a device has a part of the rows' tokens only, it is 0 for those without the first.
        """
        with jax.named_scope("order"):
            logits_B2 = self.order_logits(self.pooled(h_BTD))
            nats_B = optax.softmax_cross_entropy_with_integer_labels(logits_B2, swapped_B)
            if self.layout.context > 1 and "cp" in self.layout.manual:
                nats_B = jnp.where(jax.lax.axis_index("cp") == 0, nats_B, 0)
            return nats_B


class Dense(nnx.Module):
    """A linear layer of hidden states.

    dense       [D, O]   embed, and the dim that is given
    dense_bias  [O]
    """

    def __init__(self, cfg: ModelConfig, **out: int):
        self.dense = weight(cfg, Normal(cfg.init_std), embed=cfg.d_model, **out)
        self.dense_bias = bias(cfg, True, **out)

    def __call__(self, h: jax.Array) -> jax.Array:
        return linear(h, self.dense, self.dense_bias)


class Transform(Dense):
    """norm(activation(dense(h))), of which logits are made; the activation is that of blocks."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg, residual=cfg.d_model)
        self.norm = NORMS[cfg.norm](cfg, residual=cfg.d_model)
        self.activation = ACTIVATIONS[cfg.activation]

    def __call__(self, h: jax.Array) -> jax.Array:
        return self.norm(self.activation(super().__call__(h)))
