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
from mlm_jax.layers.dropout import sample_keys
from mlm_jax.layers.weight import materialise
from mlm_jax.layout import Layout
from mlm_jax.losses import next_token_nats
from mlm_jax.models import declare
from mlm_jax.optimizer import make_optimizer, make_schedule, updates_done

Batch = Mapping[str, jax.Array]  # see losses.next_token_nats


class TrainState(NamedTuple):
    step: jax.Array  # int32 [], batches consumed: the position in the data
    params: nnx.State  # float32 master weights
    opt_state: optax.OptState  # its moments inherit the dim names of params


class Steps(NamedTuple):
    """What a run computes, as pure functions; the loop around them owns files and clocks."""

    init: Any  # () -> TrainState
    abstract: TrainState  # shapes, dtypes and shardings of the state
    train: Any  # (TrainState, Batch) -> (TrainState, metrics); the given state is consumed
    evaluate: Any  # (params, Batch) -> (nats, weights), sums over the batch
    graphdef: nnx.GraphDef  # nnx.merge(graphdef, params) is the model


def make_steps(run: RunConfig, layout: Layout) -> Steps:
    """The steps of this run under this layout, to be compiled at their first call."""
    if run.model.attention == "cudnn" and not layout.on_gpu():
        raise ConfigError("model.attention='cudnn' needs a GPU; try model.attention='auto'")
    graphdef, declared = nnx.split(declare(run.model, layout, run.train.remat), nnx.Param)
    tx = make_optimizer(run)

    def build() -> TrainState:
        params = materialise(declared, run.train.seed)
        return TrainState(jnp.int32(0), params, tx.init(params))

    shapes = jax.eval_shape(build)
    shardings = layout.shardings(shapes)
    # Without out_shardings GSPMD may lay the new state out differently from the old.
    train = partial(train_step, run=run, layout=layout, graphdef=graphdef, tx=tx)
    return Steps(
        init=jax.jit(build, out_shardings=shardings),  # a split weight is born split
        abstract=layout.placed(shapes),
        train=jax.jit(train, donate_argnums=0, out_shardings=(shardings, None)),
        evaluate=jax.jit(partial(eval_step, run=run, layout=layout, graphdef=graphdef)),
        graphdef=graphdef,
    )


def train_step(
    state: TrainState, batch: Batch, *, run: RunConfig, layout: Layout, graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:  # fmt: skip
    """One update from one global batch, whose loss is the mean over its trained tokens.

    Where loss or gradient is not finite, weights and optimizer stay as they were and `applied` is
    False; the batch counts as consumed.
    """
    total = jnp.maximum(batch["weights"].sum(), 1)
    rows = jnp.arange(batch["tokens"].shape[0], dtype=jnp.uint32)

    def loss_of(params: nnx.State, micro: Batch) -> jax.Array:
        model = nnx.merge(graphdef, params)
        keys = sample_keys(run.train.seed, state.step, micro["row"]) if run.model.dropout else None
        return next_token_nats(model, micro, keys) / total

    def loss_and_grads(micro: Batch) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(state.params, micro)
        return loss, jax.lax.with_sharding_constraint(grads, layout.shardings(state.params))

    loss, grads = over_microbatches(
        loss_and_grads, dict(batch) | {"row": rows}, run.train.accumulate, layout
    )
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
    return TrainState(state.step + 1, params, opt_state), metrics


def eval_step(
    params: nnx.State, batch: Batch, *, run: RunConfig, layout: Layout, graphdef: nnx.GraphDef
) -> tuple[jax.Array, jax.Array]:
    """Sums over the batch, in microbatches as in training: nats of its targets, their weights."""

    def nats(micro: Batch) -> jax.Array:
        return next_token_nats(nnx.merge(graphdef, params), micro, None)

    total = over_microbatches(nats, batch, run.train.accumulate, layout)
    return total, batch["weights"].sum()


def over_microbatches(f: Callable[[Batch], Any], batch: Batch, n: int, layout: Layout) -> Any:
    """Sum of f(microbatch) over n microbatches, one after the other.

    Microbatch i holds rows i, i + n, i + 2n, ...: each device keeps its own rows, nothing is sent.
    """
    if n == 1:
        return f(batch)

    def split(x: jax.Array) -> jax.Array:
        micro = x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1)
        return layout.constrain(micro, None, "batch", *(None,) * (x.ndim - 1))

    micros = jax.tree.map(split, dict(batch))
    like = jax.eval_shape(f, jax.tree.map(lambda x: x[0], micros))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    add = lambda sums, micro: (jax.tree.map(jnp.add, sums, f(micro)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, micros)[0]
