"""Keys and values of the tokens seen so far, for generation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlm_jax.config import ModelConfig
from mlm_jax.layout import Layout

DIMS = (None, "batch", None, "kv_heads", None)


class Cache(NamedTuple):
    """k, v: [L, B, S, K, H] in model.dtype; slot s of a row holds the token at position s."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array

    @classmethod
    def zeros(cls, cfg: ModelConfig, layout: Layout, batch: int, length: int) -> "Cache":
        shape = (cfg.n_layers, batch, length, cfg.n_kv_heads, cfg.head_dim)
        return cls(*(layout.constrain(jnp.zeros(shape, cfg.dtype), *DIMS),) * 2)

    def write(
        self, layer: jax.Array, positions_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array,
        layout: Layout,
    ) -> "Cache":  # fmt: skip
        """The cache with keys and values of tokens at these positions in one layer."""
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            return layout.constrain(into.at[layer, rows_B1, positions_BT].set(new), *DIMS)

        return Cache(put(self.k_LBSKH, k_BTKH), put(self.v_LBSKH, v_BTKH))
