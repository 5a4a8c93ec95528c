"""Runs under every optimizer: any layout, same numbers, also with ZeRO; resuming; bad steps.

In float64 nothing but the order of sums may differ. Without biases: the gradient of a key's bias is
0 in exact arithmetic, and Lion and Adafactor would make a step of its rounding.
"""

from functools import cache
from itertools import product

import jax
import numpy as np
import pytest

from mlm_jax.checkpoint.manager import Checkpoints
from mlm_jax.config import CheckpointConfig
from mlm_jax.optimizer import RULES, updates_done
from mlm_jax.step import abstract_state, make_steps
from tests.conftest import LAYOUTS, named, place, tiny_batch, tiny_layout, tiny_run

STEPS = 3
SHAPE = {"d_model": 128, "d_mlp": 160, "seq_len": 16, "dtype": "float64"}  # Adafactor factors 128
WAYS = {"dp_fsdp_tp": LAYOUTS["dp_fsdp_tp"], "dp_tp": {"dp": 4, "tp": 2}}
FAST = {("muon", "dp_fsdp_tp", 1)}
CELLS = [
    pytest.param(*cell, marks=() if cell in FAST else pytest.mark.slow)
    for cell in product(RULES, WAYS, (0, 1))
]


def run_of(name, **optimizer):
    return tiny_run(
        "llama",
        model=SHAPE,
        train={"global_batch_size": 16, "accumulate": 2},
        optimizer={"name": name, "lr": 1e-2, "warmup_steps": 2, **optimizer},
    )


@cache
def one_device(name):
    run = run_of(name)
    layout = tiny_layout(run)
    steps = make_steps(run, layout)
    return run, layout, steps, steps.init()


@cache
def trained_on_one_device(name):
    """States on the host before the first step and after each, and the losses."""
    run, layout, steps, _ = one_device(name)
    return train(run, layout, steps)


def train(run, layout, steps, state=None, seeds=range(STEPS)):
    state = put(first_state(run.optimizer.name), steps) if state is None else state
    states, losses = [kept(state)], []
    for seed in seeds:
        state, metrics = steps.train(state, place(tiny_batch(run, seed), layout))
        assert metrics["applied"]
        losses.append(float(metrics["loss"]))
        states.append(kept(state))
    return states, losses


@cache
def first_state(name):
    return kept(one_device(name)[-1])


def kept(state):
    """A copy on the host: the step consumes the state it is given."""
    return jax.tree.map(np.array, state)


def put(state, steps):
    """The state laid out as these steps expect it."""
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), state, steps.abstract)


def same_bits(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.mark.parametrize(("name", "ways", "zero"), CELLS)
def test_every_optimizer_trains_under_a_layout_as_on_one_device(name, ways, zero):
    with jax.enable_x64(True):
        run = run_of(name)
        layout = tiny_layout(run, **WAYS[ways], zero=zero)
        states, losses = train(run, layout, make_steps(run, layout))
        expected_states, expected_losses = trained_on_one_device(name)
    assert len(set(losses)) == STEPS
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-13)
    got, expected = (named(s[-1].params) for s in (states, expected_states))
    for path, value in got.items():
        assert value.dtype == "float64"
        np.testing.assert_allclose(value, expected[path], rtol=0, atol=1e-11, err_msg=path)


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("name", RULES)
def test_zero_splits_the_state_over_dp_on_top_of_what_splits_it(name, ways):
    with jax.enable_x64(True):
        run, sizes = run_of(name), WAYS[ways]
        plain, zero = (abstract_state(run, tiny_layout(run, **sizes, zero=z)) for z in (0, 1))
    for p, z in zip(jax.tree.leaves(plain[:2]), jax.tree.leaves(zero[:2]), strict=True):
        assert p.sharding == z.sharding  # the weights stay as they were
    split = 0
    for p, z in zip(jax.tree.leaves(plain.opt_state), jax.tree.leaves(zero.opt_state), strict=True):
        before, after = (np.array(s.sharding.shard_shape(s.shape)) for s in (p, z))
        if (
            before.size and before[-1] > 3
        ):  # no count, no coefficients, no place of what is not kept
            assert before.prod() == sizes["dp"] * after.prod(), (z.shape, z.sharding)
            assert before[0] != run.model.n_layers or after[0] == before[0]
            split += 1
    assert split >= 12


@pytest.mark.parametrize(("name", "ways"), [("adamw", "dp_tp"), ("adafactor", "dp_fsdp_tp")])
def test_a_device_holds_its_part_of_the_state_only(name, ways):
    with jax.enable_x64(True):
        run = run_of(name)
        steps = make_steps(run, tiny_layout(run, **WAYS[ways], zero=1))
        state = steps.init()
    for x, planned in zip(jax.tree.leaves(state), jax.tree.leaves(steps.abstract), strict=True):
        shard = planned.sharding.shard_shape(planned.shape)
        assert {s.data.shape for s in x.addressable_shards} == {shard}


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_state_with_odd_leaves_is_saved_and_goes_on_exactly(name, tmp_path):
    with jax.enable_x64(True):
        run, layout, steps, _ = one_device(name)
        states, _ = trained_on_one_device(name)
        elsewhere = abstract_state(run, tiny_layout(run, **WAYS["dp_fsdp_tp"], zero=1))
        with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            checkpoints.save(2, put(states[2], steps))
            restored = checkpoints.restore(steps.abstract, 2)
            split = checkpoints.restore(elsewhere, 2)
        assert jax.tree.structure(restored) == jax.tree.structure(steps.abstract)
        assert same_bits(restored, states[2])
        assert same_bits(split, states[2])
        for x, planned in zip(jax.tree.leaves(split), jax.tree.leaves(elsewhere), strict=True):
            assert x.sharding.is_equivalent_to(planned.sharding, x.ndim)
        after, _ = train(run, layout, steps, restored, seeds=[2])
        assert same_bits(after[-1], states[3])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("lion", "sgd") else ()) for n in RULES]
)
def test_a_step_that_went_wrong_changes_nothing(name):
    with jax.enable_x64(True):
        run, layout, steps, _ = one_device(name)
        before = trained_on_one_device(name)[0][2]
        bad = tiny_batch(run)
        bad["weights"][3, 5] = np.inf
        state, metrics = steps.train(put(before, steps), place(bad, layout))
    assert not metrics["applied"]
    assert state.step == 3
    assert updates_done(state.opt_state) == 2
    assert same_bits((state.params, state.opt_state), (before.params, before.opt_state))


@pytest.mark.slow
def test_narrow_moments_train_as_well():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run = tiny_run(
            model={"seq_len": 16},
            train={"global_batch_size": 8},
            optimizer={"moment_dtype": dtype, "lr": 3e-3},
        )
        layout = tiny_layout(run)
        steps = make_steps(run, layout)
        state = steps.init()
        for _ in range(30):
            state, metrics = steps.train(state, place(tiny_batch(run), layout))
        assert state.opt_state[1].mu["blocks"]["mlp"]["up"].dtype == dtype
        losses[dtype] = float(metrics["loss"])
    assert losses["float32"] < 2
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]
