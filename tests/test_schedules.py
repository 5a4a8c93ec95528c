import math

import jax.numpy as jnp
import pytest

from mlm_jax.batch_sizes import BatchSizes
from mlm_jax.schedules import make_decay_schedule, make_schedule
from tests.conftest import tiny_run

STEPS = 100
TIMES = (0, 1, 5, 10, 11, 35, 50, 60, 69, 70, 71, 80, 99, 100, 101, 1000)
ANNEALS = {  # Megatron-LM's core/optimizer_param_scheduler.py
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (math.cos(math.pi * x) + 1) / 2,
    "exponential": lambda x: 2 * 0.5**x - 1,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


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
        ({"schedule": "linear"}, {0: 1, 25: 0.75, 100: 0, 200: 0}),
        (
            {"schedule": "linear", "warmup_steps": 10, "decay_steps": 50, "min_lr": 0.2},
            {5: 0.5, 10: 1, 20: 0.8, 30: 0.6, 50: 0.2, 99: 0.2},
        ),
        ({"schedule": "inverse_sqrt"}, {0: 1, 1: 1, 4: 0.5, 100: 0.1, 10_000: 0.01}),
        (
            {"schedule": "inverse_sqrt", "warmup_steps": 10, "min_lr": 0.2},
            {0: 0, 5: 0.5, 10: 1, 40: 0.5, 90: 1 / 3, 250: 0.2, 9999: 0.2},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_the_rate_by_updates_done(settings, rates):
    run = tiny_run(optimizer={"lr": 1.0, **settings}, train={"steps": STEPS})
    schedule = make_schedule(run)
    for step, rate in rates.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6), step


@pytest.mark.parametrize("style", ANNEALS)
@pytest.mark.parametrize("min_lr", [0.0, 0.1])
def test_wsd_stays_at_the_peak_and_then_falls_as_megatrons(style, min_lr):
    run = tiny_run(optimizer={
        "lr": 1.0, "min_lr": min_lr, "schedule": "wsd", "warmup_steps": 10, "decay_steps": STEPS,
        "wsd_decay_steps": 30, "wsd_decay_style": style,
    })  # fmt: skip
    schedule = make_schedule(run)
    for step in TIMES:
        fall = 1 if step <= 70 else ANNEALS[style](min(step - 70, 30) / 30)
        expected = step / 10 if step < 10 else min_lr + (1 - min_lr) * fall
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6), step


def test_a_short_trial_of_a_long_recipe_still_decays():
    wsd = {"lr": 1.0, "schedule": "wsd", "warmup_steps": 10, "wsd_decay_steps": 30}
    schedule = make_schedule(tiny_run(optimizer=wsd, train={"steps": 20}))
    assert [float(schedule(step)) for step in (5, 10, 40)] == pytest.approx([0.5, 1, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weight_decay": 0.3}, {0: 0.3, 50: 0.3, 999: 0.3}),
        (
            {"weight_decay": 0, "weight_decay_end": 0.4, "weight_decay_schedule": "linear"},
            {0: 0, 25: 0.1, 100: 0.4, 999: 0.4},
        ),
        (
            {"weight_decay": 0.1, "weight_decay_end": 0.3, "weight_decay_schedule": "cosine"},
            {0: 0.1, 25: 0.1 + 0.2 * (math.cos(math.pi * 0.75) + 1) / 2, 50: 0.2, 100: 0.3,
             999: 0.3},
        ),
        (
            {"weight_decay": 0.1, "weight_decay_end": 0, "weight_decay_schedule": "linear"},
            {0: 0.1, 75: 0.025, 100: 0},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_weight_decay_by_updates_done(settings, expected):
    schedule = make_decay_schedule(tiny_run(optimizer=settings, train={"steps": STEPS}))
    for step, decay in expected.items():
        assert float(schedule(step)) == pytest.approx(decay, abs=1e-6), step


@pytest.mark.parametrize("schedule", ["linear", "cosine", "inverse_sqrt", "wsd"])
def test_where_the_batch_grows_schedules_follow_the_sequences_seen(schedule):
    settings = {"lr": 1.0, "warmup_steps": 5, "schedule": schedule, "weight_decay_end": 0.5}
    settings |= {"wsd_decay_steps": 10} if schedule == "wsd" else {}
    settings |= {"weight_decay_schedule": "linear"}
    grows = {"steps": 60, "global_batch_size": 32, "batch_schedule": "0:8 1K:16 8K:32"}
    run = tiny_run(optimizer=settings, train=grows)
    sizes = BatchSizes.of(run)
    full = {"steps": sizes.start(60) // 32, "global_batch_size": 32}
    assert sizes.start(60) % 32 == 0
    of_full = tiny_run(optimizer=settings, train=full)
    for make in (make_schedule, make_decay_schedule):
        for step in (0, 1, 3, 4, 7, 20, 40, 59, 60, 100):
            expected = float(make(of_full)(sizes.start(step) / 32))
            assert float(make(run)(step)) == pytest.approx(expected, abs=1e-6), step
    assert float(make_schedule(run)(20)) == float(make_schedule(run)(jnp.int32(20)))


def test_schedules_count_more_sequences_than_int32_holds():
    grows = {"steps": 1_000_000, "global_batch_size": 4096}
    grows["batch_schedule"] = "0:1024 250B:2048 3T:4096"
    run = tiny_run(
        optimizer={"lr": 1.0, "min_lr": 0.1, "schedule": "cosine"}, train=grows,
        model={"seq_len": 4096},
    )  # fmt: skip
    assert BatchSizes.of(run).start(999_999) > 2**31
    rates = [float(make_schedule(run)(step)) for step in (0, 500_000, 800_000, 1_000_000)]
    assert rates[0] == pytest.approx(1.0)
    assert 1.0 > rates[1] > rates[2] > rates[3] == pytest.approx(0.1, abs=1e-3)
