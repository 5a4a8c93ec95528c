"""What training minimises: nats of the targets, in float32, summed so that any split adds up."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlm_jax.errors import ConfigError
from mlm_jax.layers.order import in_order
from mlm_jax.layers.watch import Seen
from mlm_jax.layers.weight import wide
from mlm_jax.layout import Layout

ROWS = (  # what a batch has of each token
    "tokens", "targets", "weights", "segments", "positions", "types", "decoder_tokens",
)  # fmt: skip
CHUNK_BYTES = 512 << 20  # of logits a device holds at once, unless loss_chunks says otherwise


class Nats(NamedTuple):
    """Sums over a batch, float32 []. Their gradient is that of the objective."""

    objective: jax.Array  # nats, z_loss * log(Z)^2 for each token, and what is told of whole rows
    nats: jax.Array  # weight * -log p(target)


def next_token_nats(
    model: Any, batch: Mapping[str, jax.Array], rngs: jax.Array | None, *,
    chunks: int | None = None, z_loss: float = 0.0, seen: Seen | None = None,
) -> Nats:  # fmt: skip
    """Nats of a batch, whose logits are computed and forgotten chunk after chunk.

    batch: tokens, targets int32 [B, T]; weights float32 [B, T], 0 = untrained; and what else the
    model reads of it: optionally segments, positions, types int32 [B, T]. rngs: dropout keys [B],
    or None. swapped int32 [B] and order_weights float32 [B], both or none: whether a row's segments
    are, which adds order_weight * -log p(swapped) to the objective.
    chunks: parts of the sequence; None: as few as keep their logits under CHUNK_BYTES a device.
    z_loss: keeps the softmax's normaliser near 1 (Chowdhery et al. 2022, section 5: 1e-4).
    seen: gets the sizes of activations.
    """
    rows = {k: batch[k] for k in ROWS if k in batch}
    batch = {**batch, **in_order(rows, model.layout)}
    h_BTD = model.read(batch, rngs, seen)
    return nats_of_hidden(model, h_BTD, batch, chunks=chunks, z_loss=z_loss)


def nats_of_hidden(
    model: Any, h_BTD: jax.Array, batch: Mapping[str, jax.Array], *, chunks: int | None = None,
    z_loss: float = 0.0,
) -> Nats:  # fmt: skip
    """The same from the last hidden states, in the order of the layout, as the batch is."""
    layout, head_weights = model.layout, model.head.weights(model.embedding)
    states_BTD, h_BTD = h_BTD, model.transformed(h_BTD)
    n, c, parts = (layout.ways(dim) for dim in ("batch", "seq", "residual_seq"))
    B, T, _ = h_BTD.shape
    if chunks is None:
        V = head_weights[0].shape[0] // layout.ways("vocab")
        held = B // n * T // c * V  # logits on a device
        chunks = fewest_chunks(T // parts, held * 4)

    def split(x_BT: jax.Array) -> jax.Array:
        """[C, n, c, B/n, parts/c, t, ...]: a device keeps its own rows, and its part of a chunk."""
        x = x_BT.reshape(n, B // n, c, parts // c, chunks, T // parts // chunks, *x_BT.shape[2:])
        return jnp.moveaxis(x, (4, 2), (0, 2))

    def nats_of(copies: Any, h: jax.Array, targets: jax.Array, weights: jax.Array) -> Nats:
        h, targets, weights = (
            layout.constrain(x, "batch", "seq", *(None,) * (x.ndim - 2))
            .reshape(n, c, -1, *x.shape[5:])
            for x in (h, targets, weights)
        )  # fmt: skip
        with jax.named_scope("head"):
            logits_ncMV = model.head(h, copies)
            log_z_ncM = jax.nn.logsumexp(logits_ncMV, axis=-1)
            nats = ((log_z_ncM - target_logit(logits_ncMV, targets)) * weights).sum()
        return Nats(nats + z_loss * (log_z_ncM**2 * weights).sum(), jax.lax.stop_gradient(nats))

    def copied(w: jax.Array) -> jax.Array:
        """One for each part of the batch: its gradient is summed over the chunks where it is made,
        and over devices once, when the broadcast is differentiated.
        """
        copies = jnp.broadcast_to(w, (n, c, *w.shape))
        return layout.constrain(copies, "batch", "seq", "vocab", *(None,) * (w.ndim - 1))

    rows = map(split, (h_BTD, batch["targets"], batch["weights"]))
    nats: Any = over_chunks(nats_of, jax.tree.map(copied, head_weights), *rows)
    if "order_weights" not in batch:
        return nats
    order = (model.order_nats(states_BTD, batch["swapped"]) * batch["order_weights"]).sum()
    return nats._replace(objective=nats.objective + order)


def check_chunks(chunks: int | None, seq_len: int, layout: Layout) -> None:
    """Raises ConfigError unless a device's part of a sequence divides by train.loss_chunks."""
    held = seq_len // layout.ways("residual_seq")
    if chunks and held % chunks:
        raise ConfigError(
            f"train.loss_chunks={chunks} does not divide the {held} tokens of a sequence that a"
            f" device holds; try {fewest_chunks(held, chunks * CHUNK_BYTES)}"
        )


def fewest_chunks(length: int, n_bytes: int) -> int:
    """The least divisor of length whose chunks of n_bytes are within CHUNK_BYTES."""
    divisors = (c for c in range(1, length + 1) if length % c == 0)
    return next(c for c in divisors if n_bytes <= c * CHUNK_BYTES or c == length)


def target_logit(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logits [..., V] at targets [...]: a masked sum, not a gather.

    With V split over tp each device adds what it holds, and only [...] numbers are sent
    (Megatron's vocabulary-parallel cross-entropy).
    """
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.where(hit, logits, 0).sum(-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def over_chunks(
    f: Callable[..., Nats], w: Any, h: jax.Array, targets: jax.Array, weights: jax.Array
) -> Nats:
    """Sum of f(w, h[c], targets[c], weights[c]) over c, to be differentiated by w and h.

    w: a tree of arrays.
    Both gradients are formed in the forward pass, where a chunk's logits are at hand: nothing else
    is kept, and nothing computed twice.
    """
    add = lambda total, chunk: (optax.tree.add(total, f(w, *chunk)), None)  # noqa: E731
    zeros = Nats(*(jnp.zeros((), wide(h.dtype)),) * 2)
    return jax.lax.scan(add, zeros, (h, targets, weights))[0]


def _over_chunks_fwd(f: Callable[..., Nats], w: Any, *stacked: jax.Array) -> Any:
    def objective(w: Any, *chunk: jax.Array) -> tuple[jax.Array, Nats]:
        nats = f(w, *chunk)
        return nats.objective, nats

    def add(total: Any, chunk: Any) -> Any:
        (_, nats), (dw, dh) = jax.value_and_grad(objective, (0, 1), has_aux=True)(w, *chunk)
        dw = jax.tree.map(lambda d: d.astype(wide(d.dtype)), dw)
        return optax.tree.add(total, (nats, dw)), dh

    no_dw = jax.tree.map(lambda w: jnp.zeros(w.shape, wide(w.dtype)), w)
    zeros = Nats(*(jnp.zeros((), wide(stacked[0].dtype)),) * 2), no_dw
    (nats, dw), dh = jax.lax.scan(add, zeros, stacked)
    like = jax.tree.map(lambda w: jnp.zeros((), w.dtype), w)
    return nats, (dw, dh, like)


def _over_chunks_bwd(f: Callable[..., Nats], grads: Any, g: Nats) -> Any:
    del f
    dw, dh, like = grads
    # In float32: 1 / tokens is no bfloat16 number.
    dw = jax.tree.map(lambda d, w: (d * g.objective).astype(w.dtype), dw, like)
    return dw, (dh * g.objective).astype(dh.dtype), None, None


over_chunks.defvjp(_over_chunks_fwd, _over_chunks_bwd)
