"""Schedules by updates done: of the learning rate, and of weight decay.

Where the batch grows (train.batch_schedule), an update counts as the share of global_batch_size
that it takes: schedules follow the sequences seen, as Megatron-LM's do.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from mlm_jax.batch_sizes import BatchSizes
from mlm_jax.config import RunConfig


def make_schedule(run: RunConfig) -> optax.Schedule:
    """The learning rate: linear warm-up from 0 to lr, then from there on to min_lr."""
    return by_sequences(run, _learning_rate(run))


def make_decay_schedule(run: RunConfig) -> optax.Schedule:
    """Weight decay: from weight_decay to weight_decay_end over the steps of the run."""
    o = run.optimizer
    end = o.weight_decay if o.weight_decay_end is None else o.weight_decay_end
    fall = FALLS[o.weight_decay_schedule](full_batches(run, run.train.steps))
    return by_sequences(run, between(o.weight_decay, end, fall))


def full_batches(run: RunConfig, steps: int) -> float:
    """Batches of global_batch_size that this many steps take."""
    return BatchSizes.of(run).start(steps) / run.train.global_batch_size


def by_sequences(run: RunConfig, schedule: optax.Schedule) -> optax.Schedule:
    """The schedule of full batches by updates done."""
    first, before, share = np.array(BatchSizes.of(run).stages).T
    if len(first) == 1:
        return schedule
    # Counted in full batches, since sequences may be more than int32 holds.
    first = jnp.asarray(np.minimum(first, np.iinfo(np.int32).max), jnp.int32)
    before, share = (jnp.asarray(x / run.train.global_batch_size) for x in (before, share))

    def by_updates(step: Any) -> Any:
        stage = jnp.searchsorted(first, step, side="right") - 1
        return schedule(before[stage] + (step - first[stage]) * share[stage])

    return by_updates


def _learning_rate(run: RunConfig) -> optax.Schedule:
    o = run.optimizer
    decay_steps = o.decay_steps or full_batches(run, run.train.steps)
    falls = max(decay_steps - o.warmup_steps, o.wsd_decay_steps or 1)

    def inverse_sqrt(step: Any) -> Any:
        updates = jnp.maximum(step + o.warmup_steps, 1)
        return jnp.maximum(o.lr * jnp.sqrt(max(o.warmup_steps, 1) / updates), o.min_lr)

    if o.schedule == "inverse_sqrt":  # Megatron's; Vaswani et al. 2017 with the peak as a setting
        after = inverse_sqrt
    elif o.schedule == "wsd":  # warm up, stay, decay: Hu et al. 2024
        assert o.wsd_decay_steps is not None
        stays, style = falls - o.wsd_decay_steps, FALLS[o.wsd_decay_style](o.wsd_decay_steps)
        constant = FALLS["constant"](stays)
        fall = optax.join_schedules([constant, style], [stays])  # pyright: ignore[reportArgumentType]
        after = between(o.lr, o.min_lr, fall)
    else:
        after = between(o.lr, o.min_lr, FALLS[o.schedule](falls))
    if not o.warmup_steps:
        return after
    warm_up = optax.linear_schedule(0.0, o.lr, o.warmup_steps)
    return optax.join_schedules([warm_up, after], [o.warmup_steps])


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
