"""Dropout by (seed, step, sample, place, layer, site): no layout and no restart changes a mask."""

import jax
import jax.numpy as jnp

SITES = {"embedding": 0, "attention": 1, "mlp": 2, "cross": 3}


def dropout(
    x_BTD: jax.Array, rate: float, keys_B: jax.Array | None, places_T: jax.Array,
    layer: jax.Array | int, site: str,
) -> jax.Array:  # fmt: skip
    """x with a share `rate` set to 0, the rest scaled up. keys_B: one a sample; None: x itself.

    places_T: of the tokens in their rows. Each token draws its own mask, so that wherever it is
    computed, it draws the same.
    """
    if keys_B is None or rate == 0.0:
        return x_BTD

    def kept(key: jax.Array, place: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, place), 1.0 - rate, x_BTD.shape[2:])

    def kept_of(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, layer), SITES[site])
        return jax.vmap(kept, (None, 0))(key, places_T)

    return jnp.where(jax.vmap(kept_of)(keys_B), x_BTD / (1.0 - rate), 0).astype(x_BTD.dtype)


def sample_keys(seed: int, step: jax.Array, samples_B: jax.Array) -> jax.Array:
    """Keys [B] of the samples at rows samples_B of the global batch of this step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, samples_B)
