"""A GPT-2 in Hugging Face's form, trained by torch: our model, loss, gradients and AdamW are its.

tests/golden/gpt2_trajectory: two layers, tied, no dropout; 20 steps of torch.optim.AdamW (lr 1e-3,
betas 0.9 and 0.95, eps 1e-8, decay 0.1 on tensors of two or more dims) after clipping to norm 1.
torch's own float32 and float64 losses differ by 1.6e-6 at most, so 1e-5 is an honest tolerance.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mlm_jax.checkpoint.hf import HfFolder
from mlm_jax.door import from_dict
from mlm_jax.losses import next_token_nats
from mlm_jax.step import make_steps
from tests.conftest import named, place, tiny_layout

GOLDEN = Path(__file__).parent / "golden" / "gpt2_trajectory"
SETTINGS = {
    "optimizer": {"lr": 1e-3, "schedule": "constant", "b1": 0.9, "b2": 0.95, "weight_decay": 0.1},
    "train": {"global_batch_size": 4},
}
HOW = {"float32": {}, "float64": {"dp": 2, "tp": 4}}


@pytest.fixture(scope="module", params=HOW)
def start(request):
    model = dataclasses.replace(HfFolder(GOLDEN).model, dtype=request.param)
    run = from_dict({"model": dataclasses.asdict(model), **SETTINGS})
    with jax.enable_x64(request.param == "float64"):
        layout = tiny_layout(run, **HOW[request.param])
        steps = make_steps(run, layout)
        yield steps, steps.init()._replace(params=weights_in(GOLDEN, steps, layout)), layout


def weights_in(folder, steps, layout):
    cfg = nnx.merge(steps.graphdef, steps.abstract.params).cfg
    return HfFolder(folder).params(cfg, layout)


@pytest.fixture(scope="module")
def batches():
    rows = np.load(GOLDEN / "batches.npy")
    ones = np.ones(rows[0, :, 1:].shape, np.float32)
    return [{"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": ones} for ids in rows]


@pytest.mark.smoke
def test_logits(start, batches):
    steps, state, layout = start
    model = nnx.merge(steps.graphdef, state.params)
    tokens = place(batches[0], layout)["tokens"]
    logits = jax.jit(lambda model: model(tokens))(model)
    expected = np.load(GOLDEN / "logits_step0.npy")
    np.testing.assert_allclose(logits[:, : expected.shape[1]], expected, atol=1e-5, rtol=0)


def test_gradients(start, batches, tmp_path):
    steps, state, layout = start

    def loss(params, batch):
        nats = next_token_nats(nnx.merge(steps.graphdef, params), batch, None).objective
        return nats / batch["weights"].size

    ours = named(jax.jit(jax.grad(loss))(state.params, place(batches[0], layout)))
    shutil.copy(GOLDEN / "config.json", tmp_path)
    shutil.copy(GOLDEN / "grads_step0.safetensors", tmp_path / "model.safetensors")
    expected = named(weights_in(tmp_path, steps, layout))  # gradients go the way of weights
    for name, gradient in ours.items():
        np.testing.assert_allclose(gradient, expected[name], atol=1e-5, rtol=0, err_msg=name)


def test_twenty_steps_of_adamw(start, batches, request):
    steps, state, layout = start
    golden, metrics = json.loads((GOLDEN / "trajectory.json").read_text()), []
    state = jax.tree.map(lambda x: x.copy(), state)  # a step consumes the state it is given
    for batch in batches:
        state, row = steps.train(state, place(batch, layout))
        metrics.append(row)
    losses, norms = ([float(row[name]) for row in metrics] for name in ("loss", "grad_norm"))
    if "float64" in request.node.name:  # what is left is torch's norm + 1e-6 in clipping
        np.testing.assert_allclose(losses, golden["loss_float64"], rtol=2e-9)
    else:
        np.testing.assert_allclose(losses, golden["loss"], rtol=1e-5)
    first = load_file(GOLDEN / "grads_step0.safetensors").values()
    exact = np.sqrt(sum(np.square(gradient, dtype=np.float64).sum() for gradient in first))
    assert norms[0] == pytest.approx(exact, rel=1e-6)
    # torch added the squares of 524,288 numbers in eight float32 sums: its first norm, 2.0425289,
    # is what that gives for the gradients it recorded, whose norm is 2.0426295.
    np.testing.assert_allclose(norms, golden["grad_norm"], rtol=2e-4)
