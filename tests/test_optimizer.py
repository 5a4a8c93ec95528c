import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.optimizer import make_optimizer, make_schedule
from mlm_jax.step import make_steps
from tests.conftest import named, tiny_layout, tiny_run

MATRICES = {"q", "k", "v", "o", "gate", "up", "down", "tokens", "positions", "weight"}


def update(run, gradient):
    """The first update, where every gradient is this number; and the first moments after it."""
    params = make_steps(run, tiny_layout(run)).init().params
    tx = make_optimizer(run)
    grads = jax.tree.map(lambda w: jnp.full_like(w, gradient), params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    return named(params), named(updates), named(state[-3].mu)


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_matrices_and_embeddings_decay_and_nothing_else(style):
    run = tiny_run(style, optimizer={"weight_decay": 0.5, "lr": 0.1})
    params, moved, _ = update(run, gradient=0.0)
    for name, change in moved.items():
        decays = name.rpartition(".")[2] in MATRICES
        np.testing.assert_allclose(change, -0.1 * 0.5 * params[name] * decays, rtol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_gradients_are_clipped_to_the_global_norm(clip):
    _, _, mu = update(tiny_run(optimizer={"clip": clip, "b1": 0.9}), gradient=2.0)
    count = sum(value.size for value in mu.values())
    seen = math.sqrt(sum(np.square(value, dtype=float).sum() for value in mu.values())) / 0.1
    assert seen == pytest.approx(clip or 2.0 * math.sqrt(count), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"schedule": "constant"}, {0: 1, 7: 1, 1000: 1}),
        ({"schedule": "constant", "warmup_steps": 4}, {0: 0, 1: 0.25, 3: 0.75, 4: 1, 1000: 1}),
        ({"schedule": "cosine"}, {0: 1, 50: 0.5, 100: 0, 200: 0}),  # decays over train.steps
        (
            {"schedule": "cosine", "warmup_steps": 10, "decay_steps": 50, "min_lr": 0.2},
            {0: 0, 5: 0.5, 10: 1, 20: 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2, 30: 0.6, 50: 0.2,
             99: 0.2},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_schedules(settings, rates):
    run = tiny_run(optimizer={"lr": 1.0, **settings}, train={"steps": 100})
    schedule = make_schedule(run)
    for step, rate in rates.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6), step
