import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlm_jax.errors import ConfigError
from mlm_jax.layout import Layout
from mlm_jax.optimizer import updates_done
from mlm_jax.step import make_steps
from tests.conftest import LAYOUTS, place, tiny_batch, tiny_layout, tiny_run

RUN = tiny_run(optimizer={"lr": 1e-2})


@functools.cache
def one_device():
    layout = tiny_layout(RUN)
    return make_steps(RUN, layout), layout


def same_bits(one, other):
    one, other = (jax.tree.leaves(jax.tree.map(np.asarray, tree)) for tree in (one, other))
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def kept(state):
    """A copy on the host: the step consumes the state it is given."""
    return jax.tree.map(np.array, state)


def test_the_loss_is_the_mean_over_trained_tokens():
    steps, layout = one_device()
    state, batch = steps.init(), tiny_batch(RUN)
    model = nnx.merge(steps.graphdef, state.params)
    logits = np.asarray(jax.jit(lambda model, x: model(x))(model, batch["tokens"]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    expected = (nats * batch["weights"]).sum() / batch["weights"].sum()
    total, weight = steps.evaluate(state.params, place(batch, layout))
    _, metrics = steps.train(state, place(batch, layout))
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert total / weight == pytest.approx(expected, rel=1e-6)
    assert metrics["weight"] == weight == batch["weights"].sum()


def test_evaluation_drops_nothing_and_adds_up_over_microbatches():
    steps, layout = one_device()
    batch = tiny_batch(RUN)
    expected = steps.evaluate(steps.init().params, place(batch, layout))
    run = tiny_run(model={"dropout": 0.5}, train={"accumulate": 4})
    layout = tiny_layout(run, **LAYOUTS["tp"])
    steps = make_steps(run, layout)
    got = steps.evaluate(steps.init().params, place(batch, layout))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.smoke
def test_what_has_no_weight_is_not_learnt():
    steps, layout = one_device()
    batch = tiny_batch(RUN)
    other = dict(batch, targets=np.where(batch["weights"] > 0, batch["targets"], 7))
    assert (other["targets"] != batch["targets"]).mean() > 0.3
    results = [steps.train(steps.init(), place(b, layout)) for b in (batch, other)]
    assert same_bits(*results)
    nothing = dict(batch, weights=np.zeros_like(batch["weights"]))
    _, metrics = steps.train(steps.init(), place(nothing, layout))
    assert (metrics["loss"], metrics["grad_norm"]) == (0, 0)


@pytest.mark.smoke
def test_a_batch_that_overflows_is_not_applied_and_the_next_is():
    steps, layout = one_device()
    state, _ = steps.train(steps.init(), place(tiny_batch(RUN), layout))
    before, good = kept(state), place(tiny_batch(RUN, seed=1), layout)
    bad = tiny_batch(RUN)
    bad["weights"][3, 5] = np.inf
    state, metrics = steps.train(state, place(bad, layout))
    assert not metrics["applied"]
    assert not math.isfinite(metrics["loss"])
    assert state.step == 2  # the batch is consumed
    assert updates_done(state.opt_state) == 1  # the schedule stands still
    assert same_bits((state.params, state.opt_state), (before.params, before.opt_state))
    state, metrics = steps.train(state, good)
    assert metrics["applied"]
    assert (state.step, updates_done(state.opt_state)) == (3, 2)
    as_if_it_had_not_been, _ = steps.train(jax.tree.map(jnp.asarray, before), good)
    assert same_bits(state.params, as_if_it_had_not_been.params)


def test_a_weight_that_is_not_a_number_stops_updates():
    steps, layout = one_device()
    state = steps.init()
    state.params["norm"]["scale"][...] = state.params["norm"]["scale"][...].at[0].set(jnp.nan)
    before = kept(state)
    state, metrics = steps.train(state, place(tiny_batch(RUN), layout))
    assert not metrics["applied"]
    assert state.step == 1
    assert same_bits((state.params, state.opt_state), (before.params, before.opt_state))


def test_the_state_keeps_its_layout_and_consumes_the_old_one():
    run = tiny_run("llama")
    layout = tiny_layout(run, **LAYOUTS["fsdp_tp"])
    steps = make_steps(run, layout)
    old = steps.init()
    new, _ = steps.train(old, place(tiny_batch(run), layout))
    for leaf, planned in zip(jax.tree.leaves(new), jax.tree.leaves(steps.abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(planned.sharding, leaf.ndim)
        assert (leaf.shape, leaf.dtype) == (planned.shape, planned.dtype)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))


def test_the_metrics_are_those_of_the_update():
    run = tiny_run(optimizer={"warmup_steps": 2, "lr": 0.5, "weight_decay": 0.0, "clip": 0.01})
    layout = tiny_layout(run)
    steps, unclipped = make_steps(run, layout), one_device()[0]
    _, expected = unclipped.train(unclipped.init(), place(tiny_batch(RUN), layout))
    state, rates, moves = steps.init(), [], []
    for seed in range(3):
        before = kept(state.params)
        state, metrics = steps.train(state, place(tiny_batch(run, seed), layout))
        if seed == 0:  # the norm is taken before clipping
            assert metrics["grad_norm"] == pytest.approx(float(expected["grad_norm"]), rel=1e-6)
        rates.append(float(metrics["learning_rate"]))
        change = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, kept(state.params))
        moves.append(max(jax.tree.leaves(change)))
    assert rates == [0.0, 0.25, 0.5]
    assert moves[0] == 0
    assert moves[1] == pytest.approx(0.25, rel=0.1)  # Adam moves weights by the rate, at most


@pytest.mark.parametrize(
    ("sections", "layout"),
    [
        ({"train": {"accumulate": 4}}, {"dp": 2, "rules": {"embed": ("fsdp", "dp")}}),
        # zigzag's parts and those of sequence parallelism are both of three tokens
        ({"model": {"seq_len": 12}}, {"cp": 2, "tp": 2, "sequence_parallel": True}),
    ],
    ids=["dp splits weights", "short sequences"],
)
def test_unusual_splits_train_as_one_device(sections, layout):
    run = tiny_run(**sections, layout=layout)
    seen = []
    for made in (
        tiny_layout(run),
        Layout.from_config(run, jax.devices()[: 2 * layout.get("tp", 1)]),
    ):
        steps = make_steps(run, made)
        _, metrics = steps.train(steps.init(), place(tiny_batch(run), made))
        seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    assert seen[1] == pytest.approx(seen[0], rel=1e-6)


def test_activations_of_stages_are_not_watched():
    run = tiny_run(train={"accumulate": 2}, layout={"pp": 2}, watch={"activations": True})
    layout = Layout.from_config(run, 2)
    with pytest.raises(ConfigError, match=r"watch.activations=True .* layout.pp=1"):
        make_steps(run, layout)
