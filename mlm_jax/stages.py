"""Loss and gradients of a batch whose layers are pipeline stages: the step's view of pipelines."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import RunConfig
from mlm_jax.gradients import added_up
from mlm_jax.layers.attention import View
from mlm_jax.layers.order import in_order, places
from mlm_jax.layout import Layout
from mlm_jax.losses import ROWS, nats_of_hidden
from mlm_jax.models import declare
from mlm_jax.models.block import run_blocks
from mlm_jax.models.pipeline import AXES, Parts, pipelined_grads, pipelined_sums

Micros = dict[str, jax.Array]  # tokens, targets, weights .. [m, B, T]; keys [m, B]; total [m]


def staged_loss_and_grads(
    params: nnx.State, micros: Micros, total: jax.Array, run: RunConfig, layout: Layout
) -> tuple[jax.Array, nnx.State]:
    """The mean of nats over `total` tokens, and the gradient of the objective."""
    rest, blocks = apart(params)
    micros = micros | {"total": jnp.broadcast_to(total, len(micros["tokens"]))}
    sums, (d_rest, d_blocks) = pipelined_grads(
        parts_of(run, layout), rest, blocks, ordered(micros, layout), layout, run.train.remat
    )
    parts = nnx.State({**d_rest, "blocks": d_blocks})
    return sums / total, added_up(parts, params, layout)


def staged_nats(params: nnx.State, micros: Micros, run: RunConfig, layout: Layout) -> jax.Array:
    """The sum of nats over the batch, without dropout."""
    micros = micros | {"total": jnp.ones(len(micros["tokens"]))}
    return pipelined_sums(parts_of(run, layout), *apart(params), ordered(micros, layout), layout)


def apart(params: nnx.State) -> tuple[dict[str, Any], Any]:
    parts = dict(params.raw_mapping)
    return parts, parts.pop("blocks")


def ordered(micros: Micros, layout: Layout) -> Micros:
    """With rows in the order of the layout, and all positions said."""
    rows = {name: micros[name] for name in ROWS if name in micros}
    if "positions" not in rows:
        T = rows["tokens"].shape[-1]
        rows["positions"] = jnp.broadcast_to(jnp.arange(T), rows["tokens"].shape)
    return micros | in_order(rows, layout)


def parts_of(run: RunConfig, layout: Layout) -> Parts:
    """The model as a pipeline calls it, on a device's own part of weights and microbatches."""
    # Where the whole tick is computed again, its blocks need not be once more.
    ticks_again = run.train.remat == "full" and layout.pipeline != "1f1b"
    remat = "none" if ticks_again else run.train.remat
    inside = layout.inside(*AXES)
    graphdef, shapes = nnx.split(declare(run.model, inside, remat), nnx.Param)
    no_rest, no_blocks = apart(shapes)  # but their shapes

    def model(rest: Any) -> Any:
        rest = inside.constrain_weights(rest)  # or XLA sums whole gradients over fsdp
        return nnx.merge(graphdef, nnx.State({**rest, "blocks": no_blocks}))

    def view(micro: Micros) -> View:
        positions = micro["positions"]
        here = places(inside, positions.shape[1])
        return View.of(run.model, positions, micro.get("segments"), here, micro.get("types"))

    def first(rest: Any, micro: Micros) -> jax.Array:
        return model(rest).embed(micro["tokens"], view(micro), micro.get("keys"))

    def blocks(chunk: Any, x: jax.Array, micro: Micros, layer: jax.Array) -> jax.Array:
        chunk = inside.constrain_weights(chunk)
        stack = nnx.merge(graphdef, nnx.State({**no_rest, "blocks": chunk})).blocks
        return run_blocks(stack, x, view(micro), micro.get("keys"), None, remat, first=layer)[0]

    def last(rest: Any, x: jax.Array, micro: Micros) -> tuple[jax.Array, jax.Array]:
        whole = model(rest)
        nats = nats_of_hidden(
            whole, whole.normed(x), micro, chunks=run.train.loss_chunks, z_loss=run.train.z_loss
        )
        return nats.objective / micro["total"], nats.nats

    return Parts(first, blocks, last)
