"""The model: what a token may see, what its logits are, and how its weights start."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.errors import ConfigError
from mlm_jax.layers.weight import materialise
from mlm_jax.layout import Layout
from mlm_jax.models import build, declare
from tests.conftest import LAYOUTS, STYLES, named, tiny_batch, tiny_layout, tiny_run


def first_weights(cfg: ModelConfig, **sizes) -> dict[str, np.ndarray]:
    run = tiny_run()
    layout = tiny_layout(run, **sizes)
    return named(nnx.state(build(cfg, layout, seed=5), nnx.Param))


@pytest.mark.parametrize("name", LAYOUTS)
def test_first_weights_do_not_depend_on_the_layout(name):
    run = tiny_run("llama")
    here, there = first_weights(run.model), first_weights(run.model, **LAYOUTS[name])
    assert here.keys() == there.keys()
    assert all(here[path].tobytes() == there[path].tobytes() for path in here)


def test_adding_weights_changes_no_other():
    cfg = tiny_run("llama").model
    more = tiny_run("llama", model={**STYLES["llama"], "bias": True, "n_layers": 3}).model
    before, after = first_weights(cfg), first_weights(more)
    assert before.keys() < after.keys()
    projections = math.sqrt(3 / 2)  # their std goes with 1 / sqrt(layers)
    for path, value in before.items():
        scale = projections if path.endswith((".o", ".down")) else 1.0
        np.testing.assert_allclose(after[path][: len(value)] * scale, value, rtol=1e-6)


def test_layers_and_weights_of_one_shape_start_differently():
    weights = first_weights(tiny_run().model)
    q, k = weights["blocks.attention.q"], weights["blocks.attention.k"]
    assert np.unique(np.concatenate([q, k])).size > 0.99 * 2 * q.size


def test_first_weights_are_as_wide_as_megatron_has_them():
    cfg = ModelConfig(n_layers=8, d_model=256, n_heads=4, vocab_size=1000)
    model = declare(cfg, Layout.create(jax.devices()[:1]))
    weights = named(jax.jit(lambda: materialise(nnx.state(model, nnx.Param), 0))())
    for path, value in weights.items():
        if path.endswith(("bias", "_bias")):
            assert (value == 0).all()
        elif path.endswith("scale"):
            assert (value == 1).all()
        else:
            std = 0.02 / math.sqrt(2 * 8) if path.endswith((".o", ".down")) else 0.02
            assert value.std() == pytest.approx(std, rel=0.02), path
            assert abs(value.mean()) < 0.02 * std


@pytest.mark.smoke
@pytest.mark.parametrize("style", STYLES)
def test_packed_documents_are_the_documents_alone(style):
    run = tiny_run(style)
    model = build(run.model, tiny_layout(run))
    batch = tiny_batch(run, packed=True)
    forward = jax.jit(lambda model, tokens, **where: model(tokens, **where))
    row = batch["segments"][:, -1].argmax()  # of the most documents
    tokens, segments = batch["tokens"][row], batch["segments"][row]
    where = {f"{name}_BT": batch[name][row][None] for name in ("segments", "positions")}
    packed = forward(model, tokens[None], **where)[0]
    assert segments[-1] > 2
    for document in np.unique(segments):
        alone = np.zeros((1, len(tokens)), np.int32)  # what follows it, nothing in it sees
        length = (segments == document).sum()
        alone[0, :length] = tokens[segments == document]
        np.testing.assert_allclose(
            forward(model, alone)[0, :length], packed[segments == document], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("style", STYLES)
def test_logits_see_what_came_before_and_nothing_after(style):
    run = tiny_run(style)
    model = build(run.model, tiny_layout(run))
    forward = jax.jit(lambda model, tokens: model(tokens))
    tokens = tiny_batch(run)["tokens"][:1]
    changed = tokens.copy()
    changed[0, 10] = (tokens[0, 10] + 1) % 500
    before, after = forward(model, tokens)[0], forward(model, changed)[0]
    np.testing.assert_array_equal(before[:10], after[:10])
    assert (abs(before[10:] - after[10:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("style", STYLES)
def test_logits_have_the_true_vocabulary_and_padding_has_no_probability(style):
    run = tiny_run(style)
    model = build(run.model, tiny_layout(run))
    tokens = tiny_batch(run)["tokens"][:2]
    assert model(tokens).shape == (2, 32, 500)
    assert model(tokens).dtype == np.float32
    p = jax.nn.softmax(model.logits(model.hidden(tokens)))
    assert p.shape == (2, 32, 512)
    assert (p[..., 500:] == 0).all()
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)


def test_bfloat16_computes_near_float32_and_keeps_float32_weights():
    wide, narrow = tiny_run(), tiny_run(model={"dtype": "bfloat16"})
    tokens = tiny_batch(wide)["tokens"][:2]
    expected, got = (build(run.model, tiny_layout(run))(tokens) for run in (wide, narrow))
    assert got.dtype == np.float32
    assert 1e-4 < abs(got - expected).max() < 0.1 * abs(expected).max()
    weights = named(nnx.state(build(narrow.model, tiny_layout(narrow)), nnx.Param))
    assert {value.dtype for value in weights.values()} == {np.dtype("float32")}


def test_a_kernel_that_would_ignore_the_mask_is_refused():
    run = tiny_run(
        model={"attention": "cudnn", "dtype": "bfloat16"}, data={"cross_document_attention": True}
    )
    model = build(run.model, tiny_layout(run))
    batch = tiny_batch(run, packed=True)
    with pytest.raises(ConfigError, match="would ignore the mask"):
        model(batch["tokens"], segments_BT=batch["segments"])
