"""Choosing the next token from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """Numbers, or arrays of the same: changing them compiles nothing.

    temperature above 0; top_k most likely tokens, 0: all; top_p: the fewest tokens that hold this
    share of the probability (Holtzman et al. 2019); repetition_penalty: logits of tokens seen
    before are divided by it if positive, else multiplied (Keskar et al. 2019), 1: off.
    """

    temperature: float | jax.Array = 1.0
    top_k: int | jax.Array = 0
    top_p: float | jax.Array = 1.0
    repetition_penalty: float | jax.Array = 1.0


def choose(
    logits_BV: jax.Array, seen_BV: jax.Array, sampling: Sampling, keys_B: jax.Array, greedy: bool
) -> jax.Array:
    """Token ids int32 [B]. seen: which tokens a row has had; keys: one a row, unused if greedy."""
    penalty = sampling.repetition_penalty
    penalised = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    if greedy:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    kept = jnp.where(sampling.top_k > 0, sampling.top_k, ordered_BV.shape[-1])
    within_k = jnp.arange(ordered_BV.shape[-1]) < kept
    p_BV = jax.nn.softmax(jnp.where(within_k, ordered_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # of the likelier ones: the first is always kept
    kept_BV = within_k & (before_BV < sampling.top_p)
    least_B1 = jnp.where(kept_BV, ordered_BV, jnp.inf).min(-1, keepdims=True)
    logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
