"""Keys and values of the tokens seen so far, for generation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlm_jax.config import ModelConfig
from mlm_jax.layout import Layout

DIMS = (None, "batch", "kv_heads", None, None)


class Cache(NamedTuple):
    """k, v: [L, B, K, S, H] in model.dtype; slot s of a row holds the token at position s.

    L is 1 where each layer has a cache of its own.
    """

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
        rows_B1, at = jnp.arange(positions_BT.shape[0])[:, None], self._at(layer)

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            return layout.constrain(into.at[at, rows_B1, :, positions_BT].set(new), *DIMS)

        return Cache(put(self.k_LBKSH, k_BTKH), put(self.v_LBKSH, v_BTKH))

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of a layer, [B, K, S, H]."""
        at = self._at(layer)
        return self.k_LBKSH[at], self.v_LBKSH[at]

    def split(self) -> tuple["Cache", ...]:
        """A cache for each layer."""
        return tuple(Cache(k[None], v[None]) for k, v in zip(*self, strict=True))

    def _at(self, layer: jax.Array) -> jax.Array | int:
        return layer if self.k_LBKSH.shape[0] > 1 else 0
