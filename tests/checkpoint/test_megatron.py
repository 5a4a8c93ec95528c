"""Checkpoints of megatron-core, in: whole, resharded, and damaged."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from mlm_jax.checkpoint.megatron import MegatronFolder, newest
from mlm_jax.checkpoint.megatron_files import Left, Ranks, load
from mlm_jax.errors import CheckpointError, DataError
from mlm_jax.layout import Layout
from mlm_jax.models import declare
from tests.conftest import named

torch = pytest.importorskip("torch")
GOLDEN = Path(__file__).parents[1] / "golden" / "megatron" / "llama_tp2"
WRITER = Path(__file__).with_name("megatron_writer.py")
KINDS = ("torch_dist", "legacy")


def imported(folder: Path | MegatronFolder, **sizes: int):
    source = folder if isinstance(folder, MegatronFolder) else MegatronFolder(folder)
    count = int(np.prod([*sizes.values()]))
    layout = Layout.create(jax.devices()[:count], **sizes).fit(source.model)
    graphdef, _ = nnx.split(declare(source.model, layout), nnx.Param)
    return nnx.merge(graphdef, source.params(source.model, layout))


def weights(model) -> dict[str, np.ndarray]:
    return named(nnx.state(model, nnx.Param))


def assert_same_logits(model, run: Path) -> None:
    logits, expected = np.asarray(model(np.load(run / "tokens.npy"))), np.load(run / "logits.npy")
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.fixture
def copy(tmp_path) -> Callable[[str], Path]:
    def made(kind: str) -> Path:
        return Path(shutil.copytree(GOLDEN / kind, tmp_path / kind))

    return made


def tensors(folder: Path) -> dict[str, np.ndarray]:
    source = MegatronFolder(folder).source
    return {name: source.read(name) for name in source.names}


def ranks_of(run: Path) -> list[Path]:
    return sorted(run.glob("iter_*/mp_rank_*/model_optim_rng.pt"))


def content_of(file: Path) -> dict:
    """As it can be saved again: without what came back empty."""
    content = load(file)
    content.pop("rng_state", None)
    del content["args"].attention_backend
    return content


def change(file: Path, edit: Callable[[dict], object]) -> None:
    content = content_of(file)
    edit(content)
    file.unlink()  # of which the tensors are mapped
    torch.save(content, file)


def test_both_formats_hold_the_model_that_was_saved():
    model = imported(GOLDEN / "torch_dist")
    assert_same_logits(model, GOLDEN)
    table = weights(model)["embedding.tokens"]
    assert not table[250:].any()
    assert table[:250].any(axis=1).all()
    jax.tree.map(np.testing.assert_array_equal, *(tensors(GOLDEN / kind) for kind in KINDS))


def test_the_model_is_what_its_arguments_say():
    cfg = MegatronFolder(GOLDEN / "legacy").model
    assert (cfg.n_layers, cfg.n_kv_heads, cfg.d_mlp, cfg.vocab_size) == (2, 2, 64, 250)
    assert (cfg.norm, cfg.activation, cfg.positions) == ("rmsnorm", "swiglu", "rotary")
    assert (cfg.bias, cfg.tied, cfg.norm_eps, cfg.dropout) == (False, False, 1e-6, 0.0)


def test_weights_go_straight_into_a_layout():
    model = imported(GOLDEN / "torch_dist", fsdp=2, tp=2)
    halves = tensors(GOLDEN / "torch_dist")["decoder.layers.1.mlp.linear_fc1.weight"]
    np.testing.assert_array_equal(weights(model)["blocks.mlp.up"][1], halves[64:].T)
    up = model.blocks.mlp.up[...]
    assert up.addressable_shards[0].data.size == up.size // 4


ENDS = ("embedding.",), ("decoder.final", "output_layer.")  # what only the first, the last have


def of_stage(tensors: dict, stage: int, ends: tuple[str, ...]) -> dict:
    """Each stage has a layer, which it calls 0."""
    own = {n: v for n, v in tensors.items() if f"layers.{stage}." in n or n.startswith(ends)}
    return {name.replace(f"layers.{stage}.", "layers.0."): v for name, v in own.items()}


def fused(name: str) -> str:
    """As TransformerEngine's layers have their norms."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def test_stages_chunks_and_fused_norms_are_the_same_model(copy):
    """The same files as two stages would have them, then two chunks of one stage."""
    expected = tensors(GOLDEN / "legacy")
    staged, chunked = copy("legacy"), copy("torch_dist").with_name("chunked")
    shutil.copytree(GOLDEN / "legacy", chunked)
    for rank in ranks_of(staged):
        content = content_of(rank)
        content["args"].pipeline_model_parallel_size = 2
        for stage, ends in enumerate(ENDS):
            own = {fused(name): v for name, v in of_stage(content["model"], stage, ends).items()}
            folder = rank.parent.with_name(f"{rank.parent.name}_{stage:03d}")
            folder.mkdir()
            torch.save({**content, "model": own}, folder / rank.name)
        shutil.rmtree(rank.parent)
    jax.tree.map(np.testing.assert_array_equal, tensors(staged), expected)
    for rank in ranks_of(chunked):

        def cut(content):
            tensors = content.pop("model")
            content |= {f"model{i}": of_stage(tensors, i, ends) for i, ends in enumerate(ENDS)}

        change(rank, cut)
    jax.tree.map(np.testing.assert_array_equal, tensors(chunked), expected)


def test_the_last_stages_copy_of_a_tied_table_is_left_out(copy):
    run = copy("legacy")
    for rank in ranks_of(run):
        content = content_of(rank)
        content["args"].pipeline_model_parallel_size = 2
        content["args"].untie_embeddings_and_output_weights = False
        for stage, ends in enumerate(ENDS):
            folder = rank.parent.with_name(f"{rank.parent.name}_{stage:03d}")
            folder.mkdir()
            own = of_stage(content["model"], stage, ends)
            torch.save({**content, "model": own}, folder / rank.name)
        shutil.rmtree(rank.parent)
    assert MegatronFolder(run).model.tied
    assert "head.weight" not in weights(imported(run))


def test_norms_stored_less_one(copy):
    run = copy("legacy")
    for rank in ranks_of(run):

        def less_one(content):
            content["args"].apply_layernorm_1p = True
            for name, value in content["model"].items():
                if "norm" in name:
                    value -= 1

        change(rank, less_one)
    assert_same_logits(imported(run), GOLDEN)


def test_bfloat16(copy):
    run = copy("legacy")
    for rank in ranks_of(run):

        def narrow(content):
            content["args"].bf16 = True
            content["model"] = {
                n: v if v is None else v.bfloat16() for n, v in content["model"].items()
            }

        change(rank, narrow)
    source = MegatronFolder(run)
    assert source.model.dtype == "bfloat16"
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    assert source.source.read(name).dtype == "bfloat16"
    of_run = source.source.read(name).astype(np.float32)
    whole = tensors(GOLDEN / "legacy")[name]
    np.testing.assert_allclose(of_run, whole, rtol=2**-8)
    assert not np.array_equal(of_run, whole)


def test_padding_is_not_the_tokenizers(copy):
    run = copy("legacy")
    for rank in ranks_of(run):
        change(rank, lambda content: vars(content["args"]).pop("vocab_size"))
    assert MegatronFolder(run).model.vocab_size == 256  # all rows, and a warning
    with pytest.raises(DataError, match="257 ids, and the model of"):
        MegatronFolder(run, "bytes")


class Evil:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def evil_rank(run: Path):
    change(ranks_of(run)[0], lambda content: content.update(x=Evil(run / "evil")))


def evil_index(run: Path):
    (run / "iter_0000003" / ".metadata").write_bytes(pickle.dumps(Evil(run / "evil")))


def evil_common(run: Path):
    change(run / "iter_0000003/common.pt", lambda content: content.update(x=Evil(run / "evil")))


def evil_chunk(run: Path):
    """A part of a tensor that is a pickle of something else."""
    import io

    buffer = io.BytesIO()
    torch.save(Evil(run / "evil"), buffer)
    for file in run.glob("iter_*/*.distcp"):
        content = file.read_bytes()
        file.write_bytes((buffer.getvalue() * (len(content) // 100))[: len(content)])


def cut_off(pattern: str, share: float = 0.7):
    def cut(run: Path):
        file = sorted(run.glob(pattern))[0]
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return cut


def wider(run: Path):
    for rank in ranks_of(run):
        change(rank, lambda content: setattr(content["args"], "ffn_hidden_size", 96))


def with_experts(run: Path):
    for rank in ranks_of(run):
        change(rank, lambda content: setattr(content["args"], "num_experts", 8))


def without_args(run: Path):
    change(ranks_of(run)[0], lambda content: content.pop("args"))


def without_size(run: Path):
    for rank in ranks_of(run):
        change(rank, lambda content: vars(content["args"]).pop("hidden_size"))


def without_tensor(run: Path):
    for rank in ranks_of(run):
        change(rank, lambda c: c["model"].pop("decoder.layers.1.mlp.linear_fc2.weight"))


def remove(name: str):
    return lambda run: [f.unlink() if f.is_file() else shutil.rmtree(f) for f in run.glob(name)]


@pytest.mark.parametrize(
    ("kind", "damage", "told"),
    [
        ("legacy", remove("iter_*/mp_rank_01"), "tp 2 and pp 1, but it lacks mp_rank_01"),
        ("legacy", remove("iter_*/mp_rank_00"), "it lacks mp_rank_00"),
        ("legacy", remove("iter_*"), "says 3, but there is no iter_0000003"),
        ("legacy", remove("iter_*/*"), "has no mp_rank_00/model_optim_rng.pt"),
        ("legacy", remove("latest*"), "is no checkpoint of Megatron-LM"),
        ("legacy", cut_off("iter_*/*/*.pt"), "model_optim_rng.pt is damaged"),
        ("legacy", evil_rank, "could run code"),
        ("legacy", wider, r"linear_fc1.weight has the shape \[128, 32\], not \[192, 32\]"),
        ("legacy", with_experts, "--num-experts 8: mixtures of experts are not there"),
        ("legacy", without_args, "holds no arguments"),
        ("legacy", without_size, "--hidden-size: needed"),
        ("legacy", without_tensor, "it lacks decoder.layers.1.mlp.linear_fc2.weight"),
        ("torch_dist", remove("iter_*/__1_0.distcp"), "__1_0.distcp is missing"),
        ("torch_dist", cut_off("iter_*/__0_0.distcp"), "__0_0.distcp has .* bytes, and not all"),
        ("torch_dist", cut_off("iter_*/.metadata"), ".metadata is no index"),
        ("torch_dist", cut_off("iter_*/common.pt"), "common.pt is damaged"),
        ("torch_dist", remove("iter_*/common.pt"), "has no arguments of Megatron-LM"),
        ("torch_dist", evil_index, "nothing that an index needs"),
        ("torch_dist", evil_common, "could run code"),
        ("torch_dist", evil_chunk, r"(could run code|is damaged)"),
    ],
)  # fmt: skip
def test_damage_is_told_and_nothing_is_run(kind, damage, told, copy):
    run = copy(kind)
    damage(run)
    with pytest.raises(CheckpointError, match=told) as error:
        imported(run)
    assert "Traceback" not in str(error.value)
    assert not (run / "evil").exists()


@pytest.mark.parametrize("text", ["", "latest", "../x", "\0"])
def test_the_newest_checkpoint_is_named_well(text, copy):
    run = copy("legacy")
    (run / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointError, match="not an iteration or release"):
        newest(run)


def test_release_and_the_folder_itself(copy):
    run = copy("legacy")
    os.rename(run / "iter_0000003", run / "release")
    (run / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert newest(run) == newest(run / "release") == run / "release"


def test_what_a_model_does_not_need_comes_back_empty():
    content = load(ranks_of(GOLDEN / "legacy")[0])
    assert isinstance(content["args"].attention_backend, Left)
    assert content["args"].hidden_size == 32
    assert Ranks(GOLDEN / "legacy" / "iter_0000003").shape("output_layer.weight") == (256, 32)


def test_without_torch_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mlm_jax\[megatron\]'"):
        MegatronFolder(GOLDEN / "torch_dist")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("style", ["gpt2", "llama", "nouns"])
def test_what_megatron_core_writes_gives_its_logits(style, tp, tmp_path):
    pytest.importorskip("megatron.core")
    words = [sys.executable, str(WRITER)]
    port = str(29500 + os.getpid() % 400 + tp)
    started = [
        subprocess.Popen([*words, str(rank), str(tp), style, str(tmp_path), port])
        for rank in range(tp)
    ]
    assert [process.wait(timeout=300) for process in started] == [0] * tp
    first, second = (imported(tmp_path / kind) for kind in KINDS)
    assert_same_logits(first, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, weights(first), weights(second))
    split = imported(tmp_path / "torch_dist", tp=2, fsdp=2)
    assert_same_logits(split, tmp_path)


@pytest.mark.slow
def test_the_command_makes_a_workdir(tmp_path, capsys):
    from mlm_jax.__main__ import main
    from mlm_jax.checkpoint.workdir import load as load_workdir

    words = ["convert", "from-megatron", str(GOLDEN / "torch_dist"), "--workdir"]
    assert main([*words, str(tmp_path / "w"), "--config.layout.preset=single"]) == 0
    assert "without a tokenizer" in capsys.readouterr().out
    assert_same_logits(load_workdir(tmp_path / "w"), GOLDEN)
    assert main([*words, str(tmp_path / "w")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["convert", "from-megatron", str(tmp_path), "--workdir", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()
