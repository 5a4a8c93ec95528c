"""Dropout whose masks depend on (seed, step, sample, layer, site): on no layout and no restart."""

import jax
import jax.numpy as jnp

SITES = {"embedding": 0, "attention": 1, "mlp": 2}


def dropout(
    x_BTD: jax.Array, rate: float, keys_B: jax.Array | None, layer: jax.Array | int, site: str
) -> jax.Array:
    """x with a share `rate` set to 0, the rest scaled up. keys_B: one a sample; None: x itself."""
    if keys_B is None or rate == 0.0:
        return x_BTD

    def kept(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, layer), SITES[site])
        return jax.random.bernoulli(key, 1.0 - rate, x_BTD.shape[1:])

    return jnp.where(jax.vmap(kept)(keys_B), x_BTD / (1.0 - rate), 0).astype(x_BTD.dtype)


def sample_keys(seed: int, step: jax.Array, samples_B: jax.Array) -> jax.Array:
    """Keys [B] of the samples at rows samples_B of the global batch of this step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, samples_B)
