"""From token ids to vectors, and back to logits."""

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.layers.weight import Normal, weight
from mlm_jax.layout import Layout


class Embedding(nnx.Module):
    """A vector for each token, and for each position where those are learned.

    tokens      [V, D]   vocab_in, vocab_embed   rows over tp
    positions   [S, D]   position, residual

    Under tp the lookup costs one all-reduce, of its result.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout):
        self.tokens = weight(
            cfg, Normal(cfg.init_std), vocab_in=cfg.padded_vocab, vocab_embed=cfg.d_model
        )
        learned = {"position": cfg.seq_len, "residual": cfg.d_model}
        self.positions = (
            weight(cfg, Normal(cfg.init_std), **learned) if cfg.positions == "learned" else None
        )
        self.layout, self.dtype = layout, cfg.dtype

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        x_BTD = self.table()[tokens_BT]
        x_BTD = self.layout.constrain(x_BTD, "batch", "seq", None)
        if self.positions is not None:
            table_SD = self.layout.constrain(self.positions[...].astype(self.dtype), None, None)
            x_BTD = x_BTD + table_SD[positions_BT]
        return x_BTD

    def table(self) -> jax.Array:
        """Token vectors [V, D] in model.dtype, split over tp by rows only, ready to be used."""
        return self.layout.constrain(self.tokens[...].astype(self.dtype), "vocab", None)


class Head(nnx.Module):
    """Logits in float32 from the last hidden states.

    weight  [D, V]  embed, vocab  columns over tp; absent where the embedding's table serves (tied)

    Rows beyond the tokenizer's vocabulary get the lowest float: their probability is exactly 0.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout):
        own = {"embed": cfg.d_model, "vocab": cfg.padded_vocab}
        self.weight = None if cfg.tied else weight(cfg, Normal(cfg.init_std), **own)
        self.layout, self.vocab_size, self.wide = layout, cfg.vocab_size, cfg.wide_dtype

    def __call__(self, h_BTD: jax.Array, embedding: Embedding) -> jax.Array:
        if self.weight is None:
            logits_BTV = jnp.einsum(
                "BTD,VD->BTV", h_BTD, embedding.table(), preferred_element_type=self.wide
            )
        else:
            w_DV = self.weight[...].astype(h_BTD.dtype)
            logits_BTV = jnp.einsum("BTD,DV->BTV", h_BTD, w_DV, preferred_element_type=self.wide)
        logits_BTV = self.layout.constrain(logits_BTV, "batch", "seq", "vocab")
        real_V = jnp.arange(logits_BTV.shape[-1]) < self.vocab_size
        return jnp.where(real_V, logits_BTV, jnp.finfo(logits_BTV.dtype).min)
