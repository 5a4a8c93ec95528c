"""From token ids to vectors, and back to logits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.layers.lookup import looked_up
from mlm_jax.layers.norm import NORMS
from mlm_jax.layers.weight import Normal, weight, wide
from mlm_jax.layout import Layout


class Embedding(nnx.Module):
    """A vector for each token, and where there are such, for its position and its type.

    tokens      [V, D]   vocab_in, vocab_embed   rows over tp
    positions   [S, D]   position, residual      where they are learned
    types       [N, D]   token_type, residual    with model.token_types
    norm        [D]      of the sum, with model.embedding_norm

    Under tp the lookup costs one all-reduce, of its result.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout):
        self.tokens = table(cfg)
        learned = {"position": cfg.seq_len, "residual": cfg.d_model}
        self.positions = (
            weight(cfg, Normal(cfg.init_std), **learned) if cfg.positions == "learned" else None
        )
        kinds = {"token_type": cfg.token_types, "residual": cfg.d_model}
        self.types = weight(cfg, Normal(cfg.init_std), **kinds) if cfg.token_types else None
        self.norm = NORMS[cfg.norm](cfg, residual=cfg.d_model) if cfg.embedding_norm else None
        self.layout, self.dtype, self.scale = layout, cfg.dtype, cfg.embedding_scale

    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, types_BT: jax.Array | None = None
    ) -> jax.Array:
        """[B, T, D]. types: None is all of type 0."""
        table_VD = self.layout.constrain(self.tokens[...].astype(self.dtype), "vocab", None)
        x_BTD = looked_up(table_VD, tokens_BT, self.layout, "vocab")
        x_BTD = self.layout.constrain(x_BTD, "batch", "seq", None)
        if self.positions is not None:
            x_BTD += self._of_all(self.positions, positions_BT)
        if self.types is not None:
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
            x_BTD += self._of_all(self.types, types_BT)
        x_BTD = x_BTD if self.scale == 1 else self.scale * x_BTD
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def _of_all(self, table: nnx.Param, ids_BT: jax.Array) -> jax.Array:
        """Rows of a table that each device holds whole while it looks them up."""
        table_SD = self.layout.constrain(table[...].astype(self.dtype), None, None)
        return looked_up(table_SD, ids_BT, self.layout, None)


class Head(nnx.Module):
    """Logits in float32 from the last hidden states.

    weight  [V, D]  vocab_in, vocab_embed  rows over tp; absent where the embedding's serves (tied)

    Rows beyond the tokenizer's vocabulary get the lowest float: their probability is exactly 0.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout):
        self.weight = None if cfg.tied else table(cfg)
        self.cfg, self.layout = cfg, layout

    def matrix(self, embedding: Embedding) -> jax.Array:
        """What hidden states are multiplied by, [V, D] in model.dtype, split over tp only."""
        w = embedding.tokens if self.weight is None else self.weight
        return self.layout.constrain(w[...].astype(self.cfg.dtype), "vocab", None)

    def __call__(self, h_BTD: jax.Array, w_VD: jax.Array) -> jax.Array:
        """h may be in parts of rows and of their sequences, [n, c, M, D], each with its own w."""
        logits_BTV = wide_product(h_BTD, w_VD)
        within = (None,) * (logits_BTV.ndim - 3)
        logits_BTV = self.layout.constrain(logits_BTV, "batch", "seq", *within, "vocab")
        if self.cfg.logit_scale != 1:
            logits_BTV *= self.cfg.logit_scale
        if cap := self.cfg.logit_softcap:
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        real_V = jnp.arange(logits_BTV.shape[-1]) < self.cfg.vocab_size
        return jnp.where(real_V, logits_BTV, jnp.finfo(logits_BTV.dtype).min)


@jax.custom_vjp
def wide_product(h: jax.Array, w: jax.Array) -> jax.Array:
    """h [..., T, D] @ w [..., V, D]^T in float32 or wider; backward multiplies in h's dtype."""
    return jnp.einsum("...TD,...VD->...TV", h, w, preferred_element_type=wide(h.dtype))


def _wide_product_bwd(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> Any:
    _, transposed = jax.vjp(partial(jnp.einsum, "...TD,...VD->...TV"), *saved)
    return transposed(g.astype(saved[0].dtype))


wide_product.defvjp(lambda h, w: (wide_product(h, w), (h, w)), _wide_product_bwd)


def table(cfg: ModelConfig) -> nnx.Param:
    """A vector for each token of the padded vocabulary, [V, D]."""
    dims = {"vocab_in": cfg.padded_vocab, "vocab_embed": cfg.d_model}
    return weight(cfg, Normal(cfg.init_std), **dims)
