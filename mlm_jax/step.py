"""The train step: a pure function of state and batch, compiled once."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mlm_jax.config import RunConfig
from mlm_jax.errors import ConfigError
from mlm_jax.gradients import BATCH_AXES, added_up_once, over_parts_of_batch
from mlm_jax.layers.dropout import sample_keys
from mlm_jax.layers.order import in_order
from mlm_jax.layers.watch import activation_sizes, both, group_norms
from mlm_jax.layers.weight import materialise
from mlm_jax.layout import Layout
from mlm_jax.losses import ROWS, check_chunks, next_token_nats
from mlm_jax.models import declare, relaid
from mlm_jax.optimizer import make_optimizer, make_schedule, updates_done
from mlm_jax.stages import staged_loss_and_grads, staged_nats

Batch = Mapping[str, jax.Array]  # see losses.next_token_nats


class TrainState(NamedTuple):
    step: jax.Array  # int32 [], batches consumed: the position in the data
    params: nnx.State  # float32 master weights
    opt_state: optax.OptState  # its moments inherit the dim names of params


class Steps(NamedTuple):
    """What a run computes, as pure functions; the loop around them owns files and clocks."""

    init: Any  # () -> TrainState
    begin: Any  # (params) -> TrainState before the first step; the given weights are consumed
    abstract: TrainState  # shapes, dtypes and shardings of the state
    train: Any  # (TrainState, Batch) -> (TrainState, metrics); the given state is consumed
    evaluate: Any  # (params, Batch) -> (nats, weights), sums over the batch
    graphdef: nnx.GraphDef  # nnx.merge(graphdef, params) is the model


def make_steps(run: RunConfig, layout: Layout) -> Steps:
    """The steps of this run under this layout, to be compiled at their first call."""
    if run.model.attention == "cudnn" and not layout.has_cudnn():
        raise ConfigError(
            "model.attention='cudnn' needs an NVIDIA GPU of compute capability 8.0 or newer; try"
            " model.attention='auto'"
        )
    if run.watch.activations and layout.mesh.shape["pp"] > 1:
        raise ConfigError(
            "watch.activations=True does not see inside of pipeline stages; leave it out, or set"
            " layout.pp=1"
        )
    written = run.model.target_len if run.model.seq2seq else run.model.seq_len
    check_chunks(run.train.loss_chunks, written, layout)
    graphdef, _ = nnx.split(declare(run.model, layout, run.train.remat), nnx.Param)
    abstract = abstract_state(run, layout)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # Without out_shardings GSPMD may lay the new state out differently from the old.
    train = partial(train_step, run=run, layout=layout, graphdef=graphdef, tx=make_optimizer(run))
    return Steps(
        init=jax.jit(partial(first_state, run, layout), out_shardings=shardings),  # born split
        begin=jax.jit(partial(state_of, run), donate_argnums=0, out_shardings=shardings),
        abstract=abstract,
        train=jax.jit(train, donate_argnums=0, out_shardings=(shardings, layout.sharding())),
        evaluate=jax.jit(partial(eval_step, run=run, layout=layout, graphdef=graphdef)),
        graphdef=graphdef,
    )


def first_state(run: RunConfig, layout: Layout) -> TrainState:
    """The state before the first step, a function of run.train.seed alone."""
    params = materialise(nnx.state(declare(run.model, layout), nnx.Param), run.train.seed)
    return state_of(run, params)


def state_of(run: RunConfig, params: nnx.State) -> TrainState:
    """The state before the first step, with these weights."""
    return TrainState(jnp.int32(0), params, make_optimizer(run).init(params))


def abstract_state(run: RunConfig, layout: Layout) -> TrainState:
    """Shapes, dtypes and shardings of the state, whose devices may be only imagined."""
    shapes = jax.eval_shape(partial(first_state, run, layout))
    step, params = layout.placed(shapes[:2])
    return TrainState(step, params, layout.placed(shapes.opt_state, of_optimizer=True))


def train_step(
    state: TrainState, batch: Batch, *, run: RunConfig, layout: Layout, graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:  # fmt: skip
    """One update from one global batch, whose loss is the mean over its trained tokens.

    Where loss or gradient is not finite, weights and optimizer stay as they were and `applied` is
    False; the batch counts as consumed. With run.watch the metrics have `watched` (layers.watch).
    """
    loss, grads, sizes = loss_and_grads(state, batch, run, layout, graphdef)
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
    grad_norm = optax.tree.norm(grads)
    applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    new = optax.apply_updates(state.params, updates), opt_state
    params, opt_state = jax.tree.map(partial(jnp.where, applied), new, state[1:])
    metrics = {
        "loss": loss, "grad_norm": grad_norm, "applied": applied, "weight": batch["weights"].sum(),
        "grad_norms": jnp.stack([optax.tree.norm(g) for g in jax.tree.leaves(grads)]),  # by weight
        "learning_rate": make_schedule(run)(updates_done(state.opt_state)),
    }  # fmt: skip
    watched = sizes | (group_norms(grads, updates, params) if run.watch.groups else {})
    if watched:
        metrics["watched"] = watched
    return TrainState(state.step + 1, params, opt_state), metrics


def loss_and_grads(
    state: TrainState, batch: Batch, run: RunConfig, layout: Layout, graphdef: nnx.GraphDef
) -> tuple[jax.Array, nnx.State, dict[str, Any]]:
    """Of the mean over the trained tokens of a global batch; and what run.watch asks of it."""
    total = jnp.maximum(batch["weights"].sum(), 1)
    rows = jnp.arange(len(batch["tokens"]), dtype=jnp.uint32)
    batch, n = dict(batch), run.train.microbatches(len(rows))
    if run.model.dropout:
        batch["keys"] = sample_keys(run.train.seed, state.step, rows)
    if "swapped" in batch:  # the mean over rows, of what is divided by tokens
        batch["order_weights"] = jnp.full(len(rows), total / len(rows), total.dtype)
    once = added_up_once(layout, n)
    here = layout.inside(*BATCH_AXES) if once else layout

    def sums(params: nnx.State, total: jax.Array, batch: Batch) -> Any:
        """Over the microbatches of the batch at hand."""

        def loss_of(params: nnx.State, micro: Batch) -> Any:
            seen = {} if run.watch.activations else None
            nats = next_token_nats(
                relaid(nnx.merge(graphdef, params), here), micro, micro.get("keys"),
                chunks=run.train.loss_chunks, z_loss=run.train.z_loss, seen=seen,
            )  # fmt: skip
            return nats.objective / total, (nats.nats / total, seen or {})

        def of_microbatch(micro: Batch) -> Any:
            (_, (loss, seen)), grads = jax.value_and_grad(loss_of, has_aux=True)(params, micro)
            return (loss, here.constrain_gradients(grads)), seen

        add = lambda a, b: (optax.tree.add(a[0], b[0]), both(a[1], b[1]))  # noqa: E731
        return over_microbatches(of_microbatch, batch, n, here, add)

    if layout.mesh.shape["pp"] > 1:
        micros = microbatches(batch, n, layout)
        (loss, grads), seen = staged_loss_and_grads(state.params, micros, total, run, layout), {}
    else:
        if once:
            batch |= in_order({name: batch[name] for name in ROWS if name in batch}, layout)
            sums = over_parts_of_batch(sums, layout)
        (loss, grads), seen = sums(state.params, total, batch)
    return loss, layout.constrain_gradients(grads), activation_sizes(seen, n) if seen else {}


def eval_step(
    params: nnx.State, batch: Batch, *, run: RunConfig, layout: Layout, graphdef: nnx.GraphDef
) -> tuple[jax.Array, jax.Array]:
    """Sums over the batch, in microbatches as in training: nats of its targets, their weights."""

    def nats(micro: Batch) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return next_token_nats(model, micro, None, chunks=run.train.loss_chunks).nats

    n = run.train.microbatches(len(batch["tokens"]))
    if layout.mesh.shape["pp"] > 1:
        total = staged_nats(params, microbatches(batch, n, layout), run, layout)
    else:
        total = over_microbatches(nats, batch, n, layout)
    return total, batch["weights"].sum()


def over_microbatches(
    f: Callable[[Batch], Any], batch: Batch, n: int, layout: Layout,
    add: Callable[[Any, Any], Any] = optax.tree.add,
) -> Any:  # fmt: skip
    """Sum of f(microbatch) over n microbatches, one after the other, beginning with zeros."""
    if n == 1:
        return f(batch)
    micros = microbatches(batch, n, layout)
    like = jax.eval_shape(f, jax.tree.map(lambda x: x[0], micros))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.scan(lambda sums, micro: (add(sums, f(micro)), None), zeros, micros)[0]


def microbatches(batch: Batch, n: int, layout: Layout) -> dict[str, jax.Array]:
    """[n, B / n, ...] of arrays [B, ...].

    Microbatch i holds rows i, i + n, i + 2n, ...: each device keeps its own rows, nothing is sent.
    """

    def split(x: jax.Array) -> jax.Array:
        micro = x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1)
        return layout.constrain(micro, None, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(split, dict(batch))
