"""Watching: the numbers are those of numpy, and training does not notice."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from mlm_jax.config import WatchConfig
from mlm_jax.layers.watch import as_row
from mlm_jax.models import build
from mlm_jax.step import make_steps
from tests.conftest import named, place, tiny_batch, tiny_layout, tiny_run

ALL = WatchConfig(groups=True, activations=True)
KINDS = ("mean_abs", "rms", "max")
SPLIT = {"dp": 2, "tp": 2, "sequence_parallel": True}
SLOW = pytest.mark.slow


def trained(run, steps=2, **axes):
    """State and metrics after each of some steps."""
    layout = tiny_layout(run, **axes)
    made = make_steps(run, layout)
    state, told = made.init(), []
    for k in range(steps):
        state, metrics = made.train(state, place(tiny_batch(run, k), layout))
        told.append(jax.device_get(metrics))
    return state, told


@pytest.mark.parametrize(
    ("style", "train", "model", "axes"),
    [
        ("gpt2", {"accumulate": 2}, {"dropout": 0.1}, {}),
        pytest.param("llama", {"remat": "full"}, {"dtype": "bfloat16"}, {}, marks=SLOW),
        pytest.param("llama", {"remat": "selective"}, {}, {"fsdp": 2, "tp": 2}, marks=SLOW),
    ],
    ids=str,
)
def test_training_is_the_same_bits_watched_or_not(style, train, model, axes):
    run = tiny_run(style, train=train, model=model)
    state, told = trained(run, **axes)
    watched_state, watched = trained(replace(run, watch=ALL), **axes)
    for one, other in zip(told, watched, strict=True):
        np.testing.assert_equal(one, {k: x for k, x in other.items() if k != "watched"})
    jax.tree.map(np.testing.assert_array_equal, named(state.params), named(watched_state.params))


def test_norms_are_those_of_each_layers_weights():
    run = replace(tiny_run(optimizer={"clip": 0.0, "weight_decay": 0.0}), watch=ALL)
    before = named(make_steps(run, tiny_layout(run)).init().params)
    state, (metrics,) = trained(run, steps=1)
    row, after = as_row(metrics["watched"]), named(state.params)
    assert row["grad_norms"].keys() == row["param_norms"].keys() == after.keys()
    for name, w in after.items():
        for kind, x in (("param_norms", w), ("update_norms", w - before[name])):
            np.testing.assert_allclose(row[kind][name], np.linalg.norm(x.ravel()), rtol=1e-4)
            if name.startswith("blocks."):
                each = [np.linalg.norm(layer.ravel()) for layer in x]
                np.testing.assert_allclose(row["by_layer"][kind][name], each, rtol=1e-4)
            else:
                assert name not in row["by_layer"][kind]
    squares = sum(np.square(norm) for norm in row["grad_norms"].values())
    np.testing.assert_allclose(np.sqrt(squares), metrics["grad_norm"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{}, SPLIT], ids=str)
def test_activations_are_those_of_the_model_one_layer_after_another(axes):
    run = replace(tiny_run(train={"accumulate": 2, "remat": "full"}), watch=ALL)
    layout = tiny_layout(run)
    batch = tiny_batch(run)
    row = as_row(trained(run, steps=1, **axes)[1][0]["watched"])
    model = build(run.model, layout, run.train.seed)
    hidden = np.asarray(model.hidden(batch["tokens"]))
    assert sizes(row, "hidden") == pytest.approx(of(hidden), rel=1e-4)
    after = [block_output(model, batch["tokens"], layers) for layers in (1, 2)]
    for layer, x in enumerate(after):
        told = [row["by_layer"][f"activation_{kind}"]["blocks"][layer] for kind in KINDS]
        assert told == pytest.approx(of(x), rel=1e-4)
    assert sizes(row, "blocks") == pytest.approx(of(np.stack(after)), rel=1e-4)
    assert row["by_layer"]["activation_rms"].keys() == {"blocks", "blocks.attention", "blocks.mlp"}


@pytest.mark.parametrize(
    ("watch", "kinds"),
    [
        ({}, set()),
        ({"groups": True}, {"grad_norms", "update_norms", "param_norms"}),
        ({"activations": True}, {f"activation_{kind}" for kind in KINDS}),
    ],
)
def test_nothing_is_told_that_nobody_asked_for(watch, kinds):
    run = tiny_run(watch=watch)
    made = make_steps(run, tiny_layout(run))
    _, metrics = jax.eval_shape(made.train, made.abstract, tiny_batch(run))
    assert metrics.get("watched", {}).keys() == kinds
    assert as_row({}) == {}


def sizes(row, name):
    return [row[f"activation_{kind}"][name] for kind in KINDS]


def of(x):
    return [np.abs(x).mean(), np.sqrt(np.square(x).mean()), np.abs(x).max()]


def block_output(model, tokens, layers):
    """The residual stream after so many blocks: what the last norm would be given."""
    given = []
    graphdef, params = nnx.split(model, nnx.Param)
    shorter = nnx.merge(graphdef, params)
    shorter.blocks = jax.tree.map(lambda w: w[:layers], shorter.blocks)
    shorter.norm = lambda x: given.append(x) or x
    shorter.hidden(tokens)
    return np.asarray(given[0])
