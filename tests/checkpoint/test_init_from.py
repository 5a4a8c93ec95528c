"""A run that begins with the weights of a model that is there."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import mlm_jax
from mlm_jax.checkpoint.convert import write_converted
from mlm_jax.checkpoint.init_from import open_source
from mlm_jax.checkpoint.workdir import load
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.door import load_config
from mlm_jax.errors import CheckpointError, ConfigError, DataError
from mlm_jax.layout import Layout
from tests.conftest import named, tiny_run

TOKENIZER = Path(__file__).parents[1] / "golden" / "data" / "tokenizer"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder with a converted model, and its run."""
    run = tiny_run("llama", model={"vocab_size": 2048})
    model = mlm_jax.build(run.model, Layout.create(jax.devices()[:1]), seed=7)
    workdir = tmp_path_factory.mktemp("converted") / "w"
    write_converted(workdir, run, nnx.state(model, nnx.Param), None, {"format": "none"})
    return workdir, run, model


def test_its_settings_are_a_config_and_what_follows_follows(converted):
    workdir, run, _ = converted
    assert load_config(workdir).model == run.model
    wider = load_config(workdir, {"model.d_model": 128, "model.n_layers": 3}).model
    assert (wider.head_dim, wider.d_mlp, wider.n_decoder_layers) == (32, 512, 3)
    assert load(workdir).origin == {"format": "none"}


@pytest.mark.parametrize("sizes", [{}, pytest.param({"fsdp": 2, "tp": 4}, marks=pytest.mark.slow)])
def test_a_run_begins_with_these_weights(sizes, converted, tmp_path):
    workdir, _, model = converted
    run = load_config(workdir, {
        "init_from": str(workdir), "train.steps": 1, "optimizer.lr": 0.0, "optimizer.min_lr": 0.0,
        "train.eval_batches": 1, **({} if sizes else {"layout.preset": "single"}),
        **{f"layout.{k}": v for k, v in sizes.items()},
    })  # fmt: skip
    mlm_jax.train(run, tmp_path / "new")
    first, last = (named(nnx.state(m, nnx.Param)) for m in (model, load(tmp_path / "new")))
    for name in first:
        np.testing.assert_array_equal(first[name], last[name])
    mlm_jax.train(dataclasses.replace(run, init_from=str(tmp_path / "gone")), tmp_path / "new")


def test_a_folder_of_hugging_face_serves_too_with_its_own_tokenizer(tmp_path):
    tokenizer = load_tokenizer(TOKENIZER)
    run = tiny_run("llama", model={"vocab_size": tokenizer.vocab_size})
    model = mlm_jax.build(run.model, Layout.create(jax.devices()[:1]), seed=7)
    model.tokenizer = tokenizer
    mlm_jax.to_hf(model, tmp_path / "hf")
    run = dataclasses.replace(run, init_from=str(tmp_path / "hf"))
    source = open_source(run, tokenizer)
    found, expected = source.params(run.model, model.layout), nnx.state(model, nnx.Param)
    for name, weight in named(found).items():
        np.testing.assert_array_equal(weight, named(expected)[name])
    with pytest.raises(
        DataError, match=r"another tokenizer than the data; .*data.tokenizer='.*hf'"
    ):
        open_source(run, load_tokenizer("bytes"))


def test_another_model_is_refused_with_what_would_agree(converted, tmp_path):
    workdir, run, _ = converted
    other = dataclasses.replace(run.model, d_mlp=128, qk_norm=True, seq_len=64)
    with pytest.raises(ConfigError) as refused:
        open_source(dataclasses.replace(run, model=other, init_from=str(workdir)), None)
    assert "\n  model.d_mlp=256, not 128\n  model.qk_norm=False, not True" in str(refused.value)
    longer = dataclasses.replace(run.model, seq_len=64, rotary_base=5e5)
    open_source(dataclasses.replace(run, model=longer, init_from=str(workdir)), None)
    with pytest.raises(CheckpointError, match="is no model"):
        open_source(dataclasses.replace(run, init_from=str(tmp_path)), None)
    with pytest.raises(CheckpointError, match=r"init_from=.* and another"):
        mlm_jax.train(run, workdir)
