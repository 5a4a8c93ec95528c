"""Keys and values of the tokens seen so far, for generation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlm_jax.config import ModelConfig
from mlm_jax.layout import Layout

DIMS = (None, "batch", "kv_heads", None, None)


class Cache(NamedTuple):
    """k, v: [L, B, K, S, H] in model.dtype; slot s of a row holds the token at position s."""

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array

    @classmethod
    def zeros(cls, cfg: ModelConfig, layout: Layout, batch: int, length: int) -> "Cache":
        shape = (cfg.n_layers, batch, cfg.n_kv_heads, length, cfg.head_dim)
        return cls(*(layout.constrain(jnp.zeros(shape, cfg.dtype), *DIMS),) * 2)

    def write(
        self, layer: jax.Array, positions_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array,
        layout: Layout,
    ) -> "Cache":  # fmt: skip
        """The cache with keys and values of tokens at these positions in one layer."""
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            return layout.constrain(into.at[layer, rows_B1, :, positions_BT].set(new), *DIMS)

        return Cache(put(self.k_LBKSH, k_BTKH), put(self.v_LBKSH, v_BTKH))
