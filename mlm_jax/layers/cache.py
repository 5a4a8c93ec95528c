"""Keys and values of the tokens seen so far, for generation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlm_jax.config import ModelConfig
from mlm_jax.layout import Layout


class Cache(NamedTuple):
    """k, v: [L, B, S, K, H] in model.dtype; slot s of a row holds the token at position s."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array

    @classmethod
    def zeros(cls, cfg: ModelConfig, layout: Layout, batch: int, length: int) -> "Cache":
        shape = (cfg.n_layers, batch, length, cfg.n_kv_heads, cfg.head_dim)
        zeros = jnp.zeros(shape, cfg.dtype)
        return cls(*(layout.constrain(zeros, None, "batch", None, "kv_heads", None),) * 2)

    def write(
        self, layer: jax.Array, positions_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
    ) -> "Cache":
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
        at = lambda x: x.at[layer, rows_B1, positions_BT]  # noqa: E731
        return Cache(at(self.k_LBSKH).set(k_BTKH), at(self.v_LBSKH).set(v_BTKH))
