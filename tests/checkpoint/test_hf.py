"""Hugging Face's models in and out, beside transformers itself."""

import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mlm_jax
from mlm_jax.checkpoint import convert, hf_export
from mlm_jax.checkpoint.hf_config import read_config, write_config
from mlm_jax.checkpoint.hf_files import open_folder
from mlm_jax.checkpoint.hf_makes import MAKES
from mlm_jax.checkpoint.workdir import load
from mlm_jax.config import ModelConfig
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.errors import CheckpointError, ConfigError, DataError, MlmJaxError
from mlm_jax.inference.engine import generate_ids
from mlm_jax.inference.sampling import Sampling
from mlm_jax.layout import Layout
from tests.checkpoint.makes import (
    CONFIGS,
    DECODERS,
    IDS,
    MASK,
    class_of,
    logits_of,
    make,
    torch,
    transformers,
)

TOKENIZER = Path(__file__).parents[1] / "golden" / "data" / "tokenizer"


FAST = ("gpt2", "llama", "gemma2", "bert", "t5")


def fast_or_slow(name: str):
    return name if name in FAST else pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(name) -> folder and reference, made once."""
    root, found = tmp_path_factory.mktemp("hf"), {}

    def get(name: str):
        if name not in found:
            found[name] = root / name, make(name, root / name)
        return found[name]

    return get


def ours(model) -> list[np.ndarray]:
    """What logits_of a reference gives, of a model of ours."""

    @jax.jit
    def found(model, ids):
        if model.cfg.family == "t5":
            return [model(ids, ids[:, :9], mask=MASK)]
        if model.cfg.family == "gpt":
            return [model(ids)]
        states = model.states(ids, mask=MASK, token_types=ids % 2)
        logits = [model(ids, mask=MASK, token_types=ids % 2)] if model.cfg.mlm_head else [states]
        pooled = model.pooled(states) if model.cfg.pooler else None
        if model.cfg.order_head:
            return [*logits, model.order_logits(pooled)]
        return logits if model.cfg.mlm_head else [*logits, pooled]

    of_words = model.cfg.family == "bert"
    said = [np.asarray(x, np.float32) for x in found(model, IDS)]
    return [x[MASK] if of_words and x.ndim == 3 else x for x in said]


def error(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Of the worst, in shares of the largest."""
    pairs = list(zip(found, wanted, strict=True))
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("name", [fast_or_slow(name) for name in CONFIGS])
def test_in_it_has_the_logits_and_out_every_bit_of_transformers(name, saved, tmp_path):
    folder, reference = saved(name)
    model = mlm_jax.from_hf(folder)
    assert error(ours(model), logits_of(reference)) < 2e-5
    mlm_jax.to_hf(model, tmp_path / "out", max_shard_size=60_000)
    a, b = open_folder(folder), open_folder(tmp_path / "out")
    assert a.names == b.names
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for tensor in a.names:
        assert a.read(tensor).tobytes() == b.read(tensor).tobytes(), tensor
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    again = class_of(name).from_pretrained(tmp_path / "out")
    assert type(again) is type(reference)
    for one, other in zip(logits_of(again), logits_of(reference), strict=True):
        np.testing.assert_array_equal(one, other)
    older = {k: v for k, v in config.items() if k not in ("rope_parameters", "layer_types")}
    if name not in ("gemma3",):  # whose pattern of layers older versions had another key for
        assert read_config(older, model_names(b)) == read_config(config, model_names(b))


def model_names(files) -> set[str]:
    return set(files.names)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tp": 4}, {"fsdp": 8}, {"pp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_straight_into_a_layout_and_out_of_it(name, sizes, saved, tmp_path):
    folder, reference = saved(name)
    layout = Layout.create(jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)
    model = mlm_jax.from_hf(folder, layout)
    if "pp" not in sizes:
        assert error(ours(model), logits_of(reference)) < 2e-5
    mlm_jax.to_hf(model, tmp_path / "out")
    a, b = open_folder(folder), open_folder(tmp_path / "out")
    for tensor in a.names:
        assert a.read(tensor).tobytes() == b.read(tensor).tobytes(), tensor


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_in_bfloat16(name, saved, tmp_path):
    reference = saved(name)[1]
    reference = type(reference)(reference.config).bfloat16().eval()
    reference.save_pretrained(tmp_path / "half")
    model = mlm_jax.from_hf(tmp_path / "half")
    assert model.cfg.dtype == "bfloat16"
    assert error(ours(model), logits_of(reference.float())) < 2e-2
    mlm_jax.to_hf(model, tmp_path / "out")
    a, b = open_folder(tmp_path / "half"), open_folder(tmp_path / "out")
    assert all(a.read(t).tobytes() == b.read(t).tobytes() for t in a.names)
    assert b.read(next(iter(b.names))).dtype == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation_is_that_of_transformers(name, saved, tmp_path):
    reference = make(name, tmp_path / "long", **{
        "n_positions" if name == "gpt2" else "max_position_embeddings": 128
    })  # fmt: skip
    prompt = IDS[0, :9].tolist()
    new = generate_ids(
        mlm_jax.from_hf(tmp_path / "long"), [prompt], max_tokens=64, sampling=Sampling(0, 0, 1, 1)
    )[0]
    out = reference.generate(
        torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    assert new == out[0, 9:].tolist()


def changed(folder: Path, to: Path, **settings) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config |= settings
    text = json.dumps({k: v for k, v in config.items() if v != "gone"})
    (to / "config.json").write_text(text)
    return to


@pytest.mark.parametrize(("settings", "told"), [
    ({"model_type": "lama"}, "'lama' is no architecture known here; the nearest is llama; known"),
    ({"model_type": "gemma3"}, "vision tower"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "another head"),
    ({"hidden_size": "gone", "vocab_size": "gone"}, "it has no vocab_size\n  it has no hidden"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu': there are silu"),
    ({"partial_rotary_factor": 0.5, "rope_parameters": None}, "only 1 can be built here"),
    ({"architectures": "LlamaForCausalLM"}, "a list of names"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ({"quantization_config": {}}, "quantization_config={}"),
    ({"intermediate_size": 100}, "has the shape [96, 64], not [100, 64]\n"),
    ({"num_hidden_layers": 3}, "it lacks model.layers.2."),
    ({"num_hidden_layers": 1}, "it has model.layers.1."),
    ({"hidden_size": "wide"}, "model.d_model='wide' is not a whole number"),
])  # fmt: skip
def test_what_cannot_be_built_is_refused(settings, told, saved, tmp_path):
    folder = changed(saved("llama")[0], tmp_path / "changed", **settings)
    with pytest.raises(CheckpointError) as refused:
        mlm_jax.from_hf(folder)
    assert told in str(refused.value)


@pytest.mark.parametrize(("name", "settings", "told"), [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "only False can be built here"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "every n-th, or none"),
    ("llama_yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 2.0}},
     "rope mscale=2.0"),
    ("gemma3", {"sliding_window": 64}, "differ in their rotary base"),
])  # fmt: skip
def test_what_nouns_do_not_say_is_refused(name, settings, told, saved):
    config = json.loads((saved(name)[0] / "config.json").read_text())
    with pytest.raises(CheckpointError) as refused:
        read_config(config | settings)
    assert told in str(refused.value)


def test_files_that_are_not_whole_are_refused(saved, tmp_path):
    folder = saved("llama")[0]
    mlm_jax.to_hf(mlm_jax.from_hf(folder), tmp_path / "out", max_shard_size=60_000)
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=f"{shard.name} is no whole safetensors file"):
        mlm_jax.from_hf(tmp_path / "out")
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}, which model.safetensors.index"):
        mlm_jax.from_hf(tmp_path / "out")
    with pytest.raises(CheckpointError, match="it has no config"):
        mlm_jax.from_hf(tmp_path)


def test_without_a_head_a_prefix_or_safetensors(saved, tmp_path):
    folder, reference = saved("gpt2")
    reference.transformer.save_pretrained(tmp_path / "bare")
    np.testing.assert_array_equal(
        ours(mlm_jax.from_hf(tmp_path / "bare")), ours(mlm_jax.from_hf(folder))
    )
    changed(folder, tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(reference.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    np.testing.assert_array_equal(
        ours(mlm_jax.from_hf(tmp_path / "pickle")), ours(mlm_jax.from_hf(folder))
    )


def test_a_tokenizer_comes_along_unless_it_has_more_ids(saved, tmp_path, caplog):
    folder = changed(saved("llama")[0], tmp_path / "small")
    with caplog.at_level(logging.WARNING):
        assert mlm_jax.from_hf(folder).tokenizer is None
    assert "no tokenizer comes along" in caplog.text
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    with pytest.raises(DataError, match="ids, and the model vectors for 300"):
        mlm_jax.from_hf(folder)


def test_an_export_that_would_lose_something_is_refused(tmp_path):
    cfg = ModelConfig(n_layers=2, d_model=32, vocab_size=300, logit_softcap=5.0, seq_len=32)
    model = mlm_jax.build(cfg, Layout.create(jax.devices()[:1]))
    with pytest.raises(CheckpointError, match="gpt2, differs in:\n  model"):
        mlm_jax.to_hf(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    plain = mlm_jax.build(ModelConfig(n_layers=2, d_model=32, seq_len=32), model.layout)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="is there already"):
        mlm_jax.to_hf(plain, tmp_path / "full")
    with pytest.raises(ConfigError, match="dtype='int8' is none"):
        mlm_jax.to_hf(plain, tmp_path / "out", dtype="int8")


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    model = mlm_jax.build(
        ModelConfig(n_layers=2, d_model=32, seq_len=32), Layout.create(jax.devices()[:1])
    )
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="and its disk has"):
        mlm_jax.to_hf(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["t5", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_copy_that_is_none_is_refused(name, saved, tmp_path):
    folder = changed(saved(name)[0], tmp_path / "two")
    tensors = load_file(folder / "model.safetensors")
    copy, of = next(iter(MAKES[name].copies.items()))
    save_file(tensors | {copy: tensors[of]}, folder / "model.safetensors")
    mlm_jax.from_hf(folder)
    save_file(tensors | {copy: 2 * tensors[of]}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{copy} is not {of}"):
        mlm_jax.from_hf(folder)


@pytest.mark.slow
def test_a_berts_head_has_the_activation_of_its_blocks(tmp_path):
    reference = make("bert", tmp_path / "relu", hidden_act="relu")
    assert error(ours(mlm_jax.from_hf(tmp_path / "relu")), logits_of(reference)) < 2e-5


def test_presets_are_what_they_are_called():
    kinds = {"t5:small": "t5", "t5:base": "t5", "bert:base": "bert", "qwen:3-8b": "qwen3"}
    kinds |= {"gemma:2-9b": "gemma2", "gemma:3-1b": "gemma3_text", "pythia:160m": "gpt_neox"}
    for spec, kind in kinds.items():
        assert write_config(mlm_jax.load_config(spec).model)[0] == kind


def test_defaults_of_ours_are_a_gpt2():
    assert write_config(ModelConfig(d_model=32))[0] == "gpt2"


def test_a_converted_model_is_a_workdir(saved, tmp_path):
    folder, _ = saved("llama")
    from mlm_jax.__main__ import main

    work, out = tmp_path / "work", tmp_path / "out"
    assert main(["convert", "from-hf", str(folder), "--workdir", str(work)]) == 0
    assert main(["checkpoint", "verify", "--workdir", str(work)]) == 0
    np.testing.assert_array_equal(ours(load(work)), ours(mlm_jax.from_hf(folder)))
    assert main(["convert", "to-hf", str(out), "--workdir", str(work)]) == 0
    assert (out / "model.safetensors").exists()
    assert main(["train", "--config", str(work), "--workdir", str(work)]) == 2
    assert main(["convert", "from-hf", str(folder), "--workdir", str(work)]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_padded_batch_has_the_logits_of_transformers(name, side, saved):
    folder, reference = saved(name)
    mask = MASK if side == "right" else MASK[:, ::-1]
    places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        expected = reference(
            torch.tensor(IDS), attention_mask=torch.tensor(mask.copy()).long(),
            position_ids=torch.tensor(places),
        ).logits.numpy()  # fmt: skip
    model = mlm_jax.from_hf(folder)
    of = {"segments_BT": mask.astype(np.int32), "positions_BT": places.astype(np.int32)}
    found = np.asarray(jax.jit(lambda model: model(IDS, **of))(model))
    assert error([found[mask]], [expected[mask]]) < 2e-5


def test_a_tokenizer_is_written_as_transformers_reads_it(saved, tmp_path):
    model = mlm_jax.from_hf(saved("gpt2")[0])
    model.tokenizer = load_tokenizer(TOKENIZER)
    mlm_jax.to_hf(model, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def add(a, b):\n    return a + b  # \u00e9"
    assert theirs(text)["input_ids"] == model.tokenizer.encode(text)


@pytest.mark.parametrize("how", ["to_hf", "from_hf"])
def test_what_fails_midway_leaves_nothing(how, saved, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    model = mlm_jax.from_hf(saved("gpt2")[0])
    if how == "to_hf":
        monkeypatch.setattr(hf_export, "write_json", full)
        with pytest.raises(MlmJaxError, match="out could not be written: No space left"):
            mlm_jax.to_hf(model, tmp_path / "out")
    else:
        monkeypatch.setattr(convert, "write_run", full)
        params = nnx.state(model, nnx.Param)
        with pytest.raises(MlmJaxError, match="out could not be written: No space left"):
            convert.write_converted(tmp_path / "out", model.run, params, None, model.origin)
    assert not list(tmp_path.iterdir())
