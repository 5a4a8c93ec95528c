"""T5 beside transformers' own: logits, loss, gradients; and what its layouts and parts do."""

import jax
import numpy as np
import pytest
from flax import nnx

from mlm_jax.errors import LayoutError
from mlm_jax.losses import next_token_nats
from mlm_jax.models import build
from mlm_jax.step import make_steps
from tests.conftest import named, place, tiny_layout, tiny_run
from tests.models.t5_reference import (
    KINDS,
    MODEL,
    ours_by_path,
    ours_like,
    padded_batch,
    transformers_t5,
)

LAYOUTS = {
    "dp": {"dp": 8},
    "fsdp": {"fsdp": 8},
    "tp": {"dp": 2, "tp": 4},
    "tp_sp": {"dp": 2, "tp": 4, "sequence_parallel": True},
    "zero1": {"dp": 8, "zero": 1},
    "dp_fsdp_tp": {"dp": 2, "fsdp": 2, "tp": 2, "zero": 1},
}
FAST = ("dp_fsdp_tp",)


def near(got, expected, relative):
    np.testing.assert_allclose(got, expected, rtol=0, atol=relative * abs(expected).max())


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=() if k == "v1.0" else pytest.mark.slow) for k in KINDS],
)
def pair(request):
    pytest.importorskip("transformers")
    theirs = transformers_t5(request.param)
    return request.param, theirs, ours_like(request.param, theirs, tiny_layout(tiny_run()))


def torch_batch(batch):
    import torch

    batch = {name: torch.from_numpy(x) for name, x in batch.items()}
    return {
        "input_ids": batch["tokens"].long(), "attention_mask": batch["segments"],
        "decoder_input_ids": batch["decoder_tokens"].long(),
    }, batch  # fmt: skip


def test_logits_are_transformers_in_a_padded_batch(pair):
    _, theirs, ours = pair
    batch = padded_batch()
    expected = theirs(**torch_batch(batch)[0]).logits.detach().numpy()
    forward = jax.jit(lambda model, *of: model(*of))
    got = forward(ours, batch["tokens"], batch["decoder_tokens"], batch["segments"] > 0)
    assert got.dtype == np.float32
    near(np.asarray(got), expected, 2e-5)


def test_loss_and_gradients_of_a_step_are_torchs(pair):
    import torch

    kind, theirs, ours = pair
    batch = padded_batch()
    inputs, more = torch_batch(batch)
    theirs.zero_grad()
    losses = torch.nn.functional.cross_entropy(
        theirs(**inputs).logits.flatten(0, 1), more["targets"].long().flatten(), reduction="none"
    )
    expected = (losses * more["weights"].flatten()).sum() / more["weights"].sum()
    expected.backward()
    expected_grads = ours_by_path(kind, {n: w.grad for n, w in theirs.named_parameters()})
    graphdef, params = nnx.split(ours, nnx.Param)

    def loss(params):
        nats = next_token_nats(nnx.merge(graphdef, params), batch, None).objective
        return nats / batch["weights"].sum()

    got, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert float(got) == pytest.approx(expected.item(), rel=1e-5)
    grads = named(grads)
    assert grads.keys() == expected_grads.keys()
    for name, g in expected_grads.items():
        assert abs(g).max() > 0, name
        near(grads[name][: len(g)] if g.ndim == 2 else grads[name], g, 1e-4)


def t5_run(kind="v1.0", accumulate=1, remat="none", dropout=0.0, **model):
    return tiny_run(
        model=MODEL | KINDS[kind] | {"n_heads": 4, "dropout": dropout, "seq_len": 24} | {
            "target_len": 16, "init_std": 0.1, **model},
        train={"global_batch_size": 16, "accumulate": accumulate, "remat": remat},
        optimizer={"eps": 1e-6},
    )  # fmt: skip


def trained(run, **sizes):
    layout = tiny_layout(run, **sizes)
    steps = make_steps(run, layout)
    state, losses = steps.init(), []
    for seed in range(3):
        batch = padded_batch(16, 24, 16, seed)
        state, metrics = steps.train(state, place(batch, layout))
        assert metrics["applied"]
        losses.append(float(metrics["loss"]))
    return losses, named(state.params)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in LAYOUTS]
)
def test_every_layout_trains_as_one_device_does(name):
    kind = "v1.1" if name in ("tp", "fsdp", "dp_fsdp_tp") else "v1.0"
    expected, params = trained(t5_run(kind, dropout=0.1))
    remat = "selective" if name in ("tp", "tp_sp") else "full"
    losses, got = trained(t5_run(kind, 2, remat, dropout=0.1), **LAYOUTS[name])
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for path, value in params.items():
        np.testing.assert_allclose(got[path], value, rtol=0, atol=1e-5, err_msg=path)


def test_dropout_draws_differently_in_encoder_decoder_and_cross():
    run = t5_run(dropout=0.5)
    model = build(run.model, tiny_layout(run))
    keys, batch = jax.random.split(jax.random.key(0), 3), padded_batch()
    of = batch["tokens"], batch["decoder_tokens"], batch["segments"]
    one, again, other = (model(*of, rngs=k) for k in (keys, keys, keys[::-1]))
    np.testing.assert_array_equal(one, again)
    assert abs(one - other).max() > 1e-2
    tokens = np.broadcast_to(batch["tokens"][:1, :8], (3, 8))
    view = model.encode(tokens, rngs=keys).states_BSD
    assert abs(view[0] - view[1]).max() > 1e-2  # rows are samples of their own


def test_tp_splits_the_heads_of_distances():
    run = t5_run()
    model = build(run.model, tiny_layout(run, dp=2, tp=4))
    table = model.encoder.distances[...]
    assert table.addressable_shards[0].data.shape == (8, 1)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [({"pp": 2}, "layout.pp=2.*layout.fsdp or layout.tp"), ({"cp": 2}, "layout.cp=2")],
)
def test_layouts_that_do_not_know_two_texts_are_refused(sizes, says):
    run = t5_run(n_decoder_layers=2)
    with pytest.raises(LayoutError, match=says):
        build(run.model, tiny_layout(run, **sizes))


def test_a_decoder_that_tp_does_not_split_is_refused():
    run = t5_run(target_len=18)
    with pytest.raises(LayoutError, match=r"model.target_len=18 .* try 20"):
        build(run.model, tiny_layout(run, tp=4, sequence_parallel=True))
