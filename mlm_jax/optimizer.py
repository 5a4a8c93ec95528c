"""Update rules and learning-rate schedules: optax's, chosen by name, as seen by one layer."""

from typing import Any

import jax
import optax

from mlm_jax.config import RunConfig
from mlm_jax.layers.weight import is_weight


def make_optimizer(run: RunConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled decay (Loshchilov & Hutter 2019), schedule, in order."""
    o = run.optimizer
    clip = [optax.clip_by_global_norm(o.clip)] if o.clip else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(o.b1, o.b2, o.eps),
        optax.add_decayed_weights(o.weight_decay, decayed),
        optax.scale_by_learning_rate(make_schedule(run)),
    )


def make_schedule(run: RunConfig) -> optax.Schedule:
    """Learning rate by updates done: linear warm-up from 0, then constant or a cosine to min_lr."""
    o = run.optimizer
    if o.schedule == "constant":
        warm_up = optax.linear_schedule(0.0, o.lr, o.warmup_steps)
        return warm_up if o.warmup_steps else optax.constant_schedule(o.lr)
    return optax.warmup_cosine_decay_schedule(
        0.0 if o.warmup_steps else o.lr, o.lr, o.warmup_steps,
        max(o.decay_steps or run.train.steps, o.warmup_steps + 1), o.min_lr,
    )  # fmt: skip


def updates_done(opt_state: Any) -> jax.Array:
    """int32 []: updates applied, which the schedule counts; bad steps are not among them."""
    return opt_state[-1].count


def decayed(params: Any) -> Any:
    """True for weights of two or more dims; biases and norms are not decayed, stacked or not."""

    def has_two_dims(w: Any) -> Any:
        dims = w.get_metadata()["out_sharding"]
        return w.replace(len(dims) - ("layer" in dims) >= 2)

    return jax.tree.map(has_two_dims, params, is_leaf=is_weight)
