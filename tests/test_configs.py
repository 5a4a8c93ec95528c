"""The shipped configs: sizes as published, and commands that are as written."""

import math
import re
import shlex
import time
from pathlib import Path

import jax
import pytest
from flax import nnx

from mlm_jax.__main__ import main
from mlm_jax.commands import add_config, command_parser, parse, path
from mlm_jax.config import ModelConfig
from mlm_jax.door import load_config, shipped_configs
from mlm_jax.layout import Layout, is_weight
from mlm_jax.models import declare

CONFIGS = sorted(shipped_configs().glob("*.py"))
# Narayanan et al. 2021, table 1: billions as printed; layers, width, heads; tp, pp, layers of a
# chunk where stages are interleaved (its script run_table_1.sh), GPUs; sequences a step and a
# microbatch.
TABLE_1 = {
    "1.7": (24, 2304, 24, 1, 1, None, 32, 512, 16),
    "3.6": (30, 3072, 32, 2, 1, None, 64, 512, 16),
    "7.5": (36, 4096, 32, 4, 1, None, 128, 512, 16),
    "18.4": (40, 6144, 48, 8, 1, None, 256, 1024, 8),
    "39.1": (48, 8192, 64, 8, 2, None, 512, 1536, 4),
    "76.1": (60, 10240, 80, 8, 4, 5, 1024, 1792, 2),
    "145.6": (80, 12288, 96, 8, 8, 5, 1536, 2304, 2),
    "310.1": (96, 16384, 128, 8, 16, 3, 1920, 2160, 1),
    "529.6": (105, 20480, 128, 8, 35, 1, 2520, 2520, 1),
    "1008": (128, 25600, 160, 8, 64, None, 3072, 3072, 1),
}
# Shoeybi et al. 2019, figure 5: model and data parallel. Korthikanti et al. 2022, table 3: layers,
# width, heads; tp, pp, GPUs; sequences a step and a microbatch.
FIGURE_5 = {"1.2": (1, 64), "2.5": (2, 64), "4.2": (4, 64), "8.3": (8, 64)}
TABLE_3 = {
    "22b": (48, 6144, 64, 8, 1, 8, 4, 4),
    "175b": (96, 12288, 96, 8, 8, 64, 64, 1),
    "530b": (105, 20480, 128, 8, 35, 280, 280, 1),
    "1t": (128, 25600, 160, 8, 64, 512, 512, 1),
}
LAYOUTS = {  # sizes of the axes, and how many devices there are
    "gpt2:124m": ({"dp": 8}, 8),
    "gpt2:355m": ({"dp": 64}, 64),
    "gpt2:774m": ({"fsdp": 8}, 8),
    "gpt2:1.5b": ({"fsdp": 8}, 8),
    "gpt2:1.2b": ({"fsdp": 8}, 8),
    "gpt2:2.5b": ({"tp": 2}, 128),
    "gpt2:4.2b": ({"tp": 4}, 256),
    "gpt2:8.3b": ({"tp": 8, "sequence_parallel": True}, 512),
    "gpt3:1.7b": ({"dp": 32}, 32),
    "gpt3:3.6b": ({"dp": 32, "tp": 2}, 64),
    "gpt3:7.5b": ({"fsdp": 32, "tp": 4}, 128),
    "gpt3:18.4b": ({"dp": 32, "tp": 8}, 256),
    "gpt3:39.1b": ({"pp": 2, "tp": 8}, 512),
    "gpt3:76.1b": ({"pp": 4, "chunks": 3, "tp": 8}, 1024),
    "gpt3:145.6b": ({"pp": 8, "chunks": 2, "tp": 8}, 1536),
    "gpt3:310.1b": ({"pp": 16, "chunks": 2, "tp": 8}, 1920),
    "gpt3:529.6b": ({"pp": 35, "chunks": 3, "tp": 8}, 2520),
    "gpt3:1008b": ({"pp": 64, "tp": 8}, 3072),
    "gpt3:22b": ({"preset": "tp_sp"}, 8),
    "gpt3:175b": ({"pp": 8, "chunks": 3, "tp": 8, "sequence_parallel": True}, 64),
    "gpt3:530b": ({"pp": 35, "chunks": 3, "tp": 8, "sequence_parallel": True}, 280),
    "gpt3:1t": ({"pp": 64, "tp": 8, "sequence_parallel": True}, 512),
    "llama:tiny": ({"preset": "fsdp_tp"}, 8),
    "llama:2-7b": ({"fsdp": 8}, 8),
    "llama:3-8b": ({"fsdp": 64}, 64),
    "llama:3.1-8b": ({"fsdp": 64}, 64),
    "llama:3.2-1b": ({"fsdp": 8}, 8),
    "llama:3-70b": ({"fsdp": 16, "tp": 8}, 128),
    "llama:3.1-405b": ({"fsdp": 64, "tp": 8, "sequence_parallel": True}, 512),
    "bert:tiny": ({"preset": "fsdp_tp"}, 8),
    "bert:base": ({"dp": 8}, 8),
    "bert:large": ({"dp": 8}, 8),
    "bert:336m": ({"dp": 128}, 128),
    "bert:1.3b": ({"dp": 64, "tp": 4}, 256),
    "bert:3.9b": ({"dp": 64, "tp": 8}, 512),
    "mistral:7b": ({"fsdp": 8}, 8),
    "qwen:2.5-0.5b": ({"dp": 8}, 8),
    "qwen:2.5-7b": ({"fsdp": 8, "tp": 4}, 32),
    "qwen:3-0.6b": ({"dp": 8}, 8),
    "qwen:3-8b": ({"fsdp": 8}, 8),
    "gemma:1-7b": ({"fsdp": 8, "tp": 8}, 64),
    "gemma:2-2b": ({"fsdp": 8}, 8),
    "gemma:2-9b": ({"fsdp": 16, "tp": 8}, 128),
    "gemma:3-1b": ({"fsdp": 8}, 8),
    "pythia:160m": ({"dp": 8}, 8),
    "pythia:1.4b": ({"fsdp": 8}, 8),
    "pythia:6.9b": ({"fsdp": 8, "tp": 8}, 64),
    "quickstart": ({"preset": "fsdp_tp"}, 8),
    "t5:tiny": ({"preset": "fsdp_tp"}, 8),
    "t5:small": ({"dp": 8}, 8),
    "t5:base": ({"dp": 8}, 8),
    "t5:large": ({"fsdp": 8}, 8),
    "t5:3b": ({"fsdp": 8}, 8),
    "t5:11b": ({"fsdp": 8, "tp": 8}, 64),
    "t5:v1.1-small": ({"dp": 8}, 8),
    "t5:v1.1-base": ({"dp": 8}, 8),
    "t5:v1.1-large": ({"fsdp": 8}, 8),
    "t5:v1.1-xxl": ({"fsdp": 8, "tp": 8}, 64),
    "t5:v1.1-xl": ({"fsdp": 4, "tp": 2}, 8),
}


def commands() -> list[str]:
    """Every training that a shipped config's docstring shows."""
    texts = [file.read_text(encoding="utf-8") for file in CONFIGS]
    return [
        line for text in texts for line in re.findall(r"^mlm-jax train .*$", text, re.MULTILINE)
    ]


def in_float32(row: dict) -> int:
    return 4 * math.prod(row["shape"])


def parameters(cfg: ModelConfig) -> int:
    """Without the rows that pad the vocabulary, once more where the head has a table of its own."""
    params = nnx.state(declare(cfg, Layout.create(1)), nnx.Param)
    count = sum(math.prod(w.shape) for w in jax.tree.leaves(params, is_leaf=is_weight))
    of_a_row = cfg.d_model * (1 if cfg.tied else 2) + (cfg.family == "bert" and cfg.mlm_head)
    return count - (cfg.padded_vocab - cfg.vocab_size) * of_a_row


@pytest.mark.parametrize(
    ("spec", "published"),
    [
        ("gpt2:124m", 124_439_808),  # the checkpoints of Radford et al. 2019
        ("gpt2:355m", 354_823_168),
        ("gpt2:774m", 774_030_080),
        ("gpt2:1.5b", 1_557_611_200),
        ("bert:base", 110_106_428),  # transformers' BertForPreTraining
        ("bert:large", 336_226_108),
        ("llama:2-7b", 6_738_415_616),
        ("llama:3-8b", 8_030_261_248),  # the model cards of Llama 3 and 3.1
        ("llama:3.1-8b", 8_030_261_248),
        ("llama:3.2-1b", 1_235_814_400),
        ("llama:3-70b", 70_553_706_496),
        ("llama:3.1-405b", 405_853_388_800),
        ("mistral:7b", 7_241_732_096),  # from here on as their checkpoints have them
        ("qwen:2.5-0.5b", 494_032_768),
        ("qwen:2.5-7b", 7_615_616_512),
        ("qwen:3-0.6b", 596_049_920),
        ("qwen:3-8b", 8_190_735_360),
        ("gemma:1-7b", 8_537_680_896),
        ("gemma:2-2b", 2_614_341_888),
        ("gemma:2-9b", 9_241_705_984),
        ("gemma:3-1b", 999_885_952),
        ("pythia:160m", 162_322_944),
        ("pythia:1.4b", 1_414_647_808),
        ("pythia:6.9b", 6_857_302_016),
    ],
)
def test_parameters_are_as_many_as_published(spec, published):
    assert parameters(load_config(spec).model) == published


@pytest.mark.parametrize(
    ("size", "published"),
    [("base", 109_482_240), ("large", 335_141_888)],  # BertModel of bert-{base,large}-uncased
)
def test_a_bert_without_its_heads_has_as_many_as_published(size, published):
    run = load_config(f"bert:{size}", {"model.mlm_head": False, "model.order_head": False})
    assert parameters(run.model) == published


@pytest.mark.parametrize("printed", ["336m", "1.3b", "3.9b"])
def test_megatrons_berts_round_to_what_was_printed(printed):
    count = parameters(load_config(f"bert:{printed}").model)
    assert printed in (f"{count / 1e6:.0f}m", f"{count / 1e9:.1f}b")


@pytest.mark.parametrize("printed", ["1.2", "2.5", "4.2", "8.3"])
def test_megatrons_first_sizes_round_to_what_was_printed(printed):
    cfg = load_config(f"gpt2:{printed}b").model
    assert cfg.seq_len == 1024
    assert f"{parameters(cfg) / 1e9:.1f}" == printed


@pytest.mark.parametrize("printed", TABLE_1)
def test_the_table_of_2021_follows_from_its_own_formula(printed):
    layers, width, heads, *_ = TABLE_1[printed]
    cfg = load_config(f"gpt3:{printed}b").model
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads) == (layers, width, heads)
    P = 12 * layers * width**2  # equation 2, times 1 + 13 / 12h + (V + s) / 12lh
    P += 13 * layers * width + (51200 + 2048) * width
    last_norm = 2 * width  # not in the formula
    assert parameters(cfg) == P + last_norm
    assert f"{P / 1e9:.1f}".removesuffix(".0") == printed


def test_every_size_has_a_layout_here():
    sizes = {f.stem: re.findall(r'^    "(.*?)": \(', f.read_text(), re.MULTILINE) for f in CONFIGS}
    specs = {f"{name}:{size}" for name, found in sizes.items() for size in found}
    assert specs | {"quickstart"} == LAYOUTS.keys()


@pytest.mark.parametrize("spec", LAYOUTS)
def test_every_preset_fits_a_sensible_layout(spec):
    axes, devices = LAYOUTS[spec]
    run = load_config(spec, {f"layout.{axis}": size for axis, size in axes.items()})
    begun = time.perf_counter()
    layout = Layout.from_config(run, devices)
    rows = layout.explain(nnx.state(declare(run.model, layout), nnx.Param))
    assert time.perf_counter() - begun < 1  # shapes only: 0.05 s
    stacks = layout.mesh.shape["pp"] > 1  # then tables are whole on each stage
    tables = [row for row in rows if "position" not in row["dims"]]  # may be whole everywhere
    tables = [row for row in tables if "layer" in row["dims"] or not stacks]
    held, all_of_it = (sum(row["bytes"] for row in tables), sum(map(in_float32, tables)))
    assert 1 <= held / all_of_it * layout.mesh.size / layout.mesh.shape["dp"] < 1.1


def test_every_family_says_how_to_start():
    shown = {re.findall(r"--config (\S+)", line)[0] for line in commands()}
    wanted = {spec for spec in LAYOUTS if not spec.startswith(("gpt2:", "t5:"))}
    assert shown >= wanted | {"gpt2:124m", "gpt2:1.2b", "t5:tiny", "t5:large", "t5:v1.1-xl"}


@pytest.mark.parametrize("line", commands())
def test_a_docstrings_command_parses_and_its_layout_fits(line, capsys):
    name, *words = shlex.split(line)[1:]
    parser = command_parser(name, "")
    add_config(parser)
    parser.add_argument("--workdir", type=path, required=True)
    args, overrides = parse(parser, words)
    assert args.workdir == Path("runs") / args.workdir.name
    settings = [f"--config.{key}={value}" for key, value in overrides.items()]
    assert main(["explain", "--config", args.config, *settings]) == 0
    assert "GiB of weights on a device" in capsys.readouterr().out


def sizes_in(line: str) -> dict[str, int]:
    """Sizes of the layout that a command sets."""
    return {key: int(n) for key, n in re.findall(r"--config\.layout\.(\w+)=(\d+)", line)}


def command_of(spec: str, first: str = "") -> dict[str, int]:
    return next(sizes_in(line) for line in commands() if f" {spec} " in line and first in line)


@pytest.mark.parametrize("printed", FIGURE_5)
def test_a_command_of_the_2019_figure_has_the_papers_parallelism(printed):
    tp, dp = FIGURE_5[printed]
    found = command_of(f"gpt2:{printed}b", "layout.dp=")
    assert found == {"dp": dp} | ({"tp": tp} if tp > 1 else {})


@pytest.mark.parametrize("printed", TABLE_1)
def test_a_command_of_the_2021_table_has_the_papers_parallelism(printed):
    layers, _, _, tp, pp, in_chunk, gpus, batch, micro = TABLE_1[printed]
    sizes = command_of(f"gpt3:{printed}b")
    train = load_config(f"gpt3:{printed}b").train
    assert (sizes.get("tp", 1), sizes.get("pp", 1)) == (tp, pp)
    assert sizes.get("chunks", 1) == (layers // pp // in_chunk if in_chunk else 1)
    assert math.prod(sizes[axis] for axis in sizes if axis != "chunks") == gpus
    assert (train.global_batch_size, train.microbatch) == (batch, micro * sizes["dp"])


@pytest.mark.parametrize("size", TABLE_3)
def test_a_command_of_the_2022_table_has_the_papers_parallelism(size):
    *shape, tp, pp, gpus, batch, micro = TABLE_3[size]
    sizes, run = command_of(f"gpt3:{size}", "sequence_parallel=True"), load_config(f"gpt3:{size}")
    assert [run.model.n_layers, run.model.d_model, run.model.n_heads] == shape
    assert (sizes["tp"], sizes.get("pp", 1), tp * pp) == (tp, pp, gpus)
    assert (run.train.global_batch_size, run.train.microbatch) == (batch, micro)
    assert run.train.remat == "selective"


@pytest.mark.parametrize(
    ("fsdp", "cp", "gpus"), [(64, 1, 8192), (128, 1, 16384), (8, 16, 16384)], ids=str
)
def test_405b_has_the_papers_parallelism_on_14_stages_of_16(fsdp, cp, gpus):
    sizes = command_of("llama:3.1-405b", f"pp=14 --config.layout.fsdp={fsdp} ")
    assert sizes == {"pp": 14, "fsdp": fsdp, "tp": 8} | ({"cp": cp} if cp > 1 else {})
    assert math.prod(sizes.values()) * 16 == gpus * 14


T5_SIZES = {  # published: t5-small, t5-base, t5-large; the others by transformers' own configs
    "small": 60_506_624, "base": 222_903_552, "large": 737_668_096, "3b": None, "11b": None,
    "v1.1-small": None, "v1.1-base": None, "v1.1-large": None, "v1.1-xl": None, "v1.1-xxl": None,
    "mt5-small": None, "mt5-base": None, "mt5-large": None, "mt5-xl": None, "mt5-xxl": None,
}  # fmt: skip


@pytest.mark.parametrize("size", T5_SIZES)
def test_t5_has_the_parameters_of_transformers(size):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    cfg = load_config(f"t5:{size}").model
    with torch.device("meta"):
        theirs = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=cfg.vocab_size, d_model=cfg.d_model, d_kv=cfg.head_dim, d_ff=cfg.d_mlp,
                num_layers=cfg.n_layers, num_heads=cfg.n_heads,
                feed_forward_proj="relu" if cfg.tied else "gated-gelu",
            )
        )  # fmt: skip
    expected = sum(w.numel() for w in theirs.parameters())
    if not cfg.tied:  # transformers shares the head's matrix until weights are loaded
        expected += cfg.vocab_size * cfg.d_model
    assert T5_SIZES[size] in (None, expected)
    assert cfg.vocab_size == cfg.padded_vocab
    model = declare(cfg, Layout.create(jax.devices()[:1]))
    ours = jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=is_weight)
    assert sum(math.prod(w.shape) for w in ours) == expected
