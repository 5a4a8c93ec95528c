"""What training minimises: nats of the targets, in float32, summed so that any split adds up."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mlm_jax.layers.watch import Seen, see


def next_token_nats(
    model: Any, batch: Mapping[str, jax.Array], rngs: jax.Array | None, seen: Seen | None = None
) -> jax.Array:
    """Sum over the batch of weight * -log p(target): float32 [].

    batch: tokens, targets int32 [B, T]; weights float32 [B, T], 0 = untrained; optionally segments
    and positions int32 [B, T]. rngs: dropout keys [B], or None. seen: gets sizes of activations.
    """
    h_BTD = model.hidden(
        batch["tokens"], segments_BT=batch.get("segments"), positions_BT=batch.get("positions"),
        rngs=rngs, seen=seen,
    )  # fmt: skip
    logits_BTV = model.logits(h_BTD)
    see(seen, "logits", logits_BTV, columns=model.cfg.vocab_size)
    nats_BT = cross_entropy(logits_BTV, batch["targets"])
    return (nats_BT * batch["weights"]).sum()


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], [B, T], in the logits' dtype.

    The target's logit is a masked sum, not a gather: with V split over tp each device adds what it
    holds, and only [B, T] numbers are sent (Megatron's vocabulary-parallel cross-entropy).
    """
    hit_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.where(hit_BTV, logits_BTV, 0).sum(-1)
