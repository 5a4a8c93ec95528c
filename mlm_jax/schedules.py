"""Schedules by updates done: of the learning rate, and of weight decay."""

from typing import Any

import jax.numpy as jnp
import optax

from mlm_jax.config import RunConfig


def make_schedule(run: RunConfig) -> optax.Schedule:
    """The learning rate: linear warm-up from 0 to lr, then from there on to min_lr."""
    o = run.optimizer
    falls = max((o.decay_steps or run.train.steps) - o.warmup_steps, o.wsd_decay_steps or 1)

    def inverse_sqrt(step: Any) -> Any:
        updates = jnp.maximum(step + o.warmup_steps, 1)
        return jnp.maximum(o.lr * jnp.sqrt(max(o.warmup_steps, 1) / updates), o.min_lr)

    if o.schedule == "inverse_sqrt":  # Megatron's; Vaswani et al. 2017 with the peak as a setting
        after = inverse_sqrt
    elif o.schedule == "wsd":  # warm up, stay, decay: Hu et al. 2024
        assert o.wsd_decay_steps is not None
        stays, style = falls - o.wsd_decay_steps, FALLS[o.wsd_decay_style](o.wsd_decay_steps)
        fall = optax.join_schedules([FALLS["constant"](stays), style], [stays])
        after = between(o.lr, o.min_lr, fall)
    else:
        after = between(o.lr, o.min_lr, FALLS[o.schedule](falls))
    if not o.warmup_steps:
        return after
    warm_up = optax.linear_schedule(0.0, o.lr, o.warmup_steps)
    return optax.join_schedules([warm_up, after], [o.warmup_steps])


def make_decay_schedule(run: RunConfig) -> optax.Schedule:
    """Weight decay: from weight_decay to weight_decay_end over the steps of the run."""
    o = run.optimizer
    end = o.weight_decay if o.weight_decay_end is None else o.weight_decay_end
    return between(o.weight_decay, end, FALLS[o.weight_decay_schedule](run.train.steps))


def between(start: float, end: float, fall: optax.Schedule) -> optax.Schedule:
    """`start` where `fall` is 1, `end` where it is 0."""
    return lambda step: end + (start - end) * fall(step)


# How to fall from 1 to 0 in so many steps, and stay there. The last two are Megatron's, for WSD.
FALLS = {
    "constant": lambda steps: optax.constant_schedule(1.0),
    "linear": lambda steps: optax.linear_schedule(1.0, 0.0, steps),
    "cosine": lambda steps: optax.cosine_decay_schedule(1.0, steps),
    "exponential": lambda steps: lambda step: 2 * 0.5 ** jnp.clip(step / steps, 0, 1) - 1,
    "minus_sqrt": lambda steps: lambda step: 1 - jnp.sqrt(jnp.clip(step / steps, 0, 1)),
}
