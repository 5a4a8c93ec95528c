"""Launch scripts of Megatron-LM become config files, and say what did not come along."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlm_jax.checkpoint.megatron_run import config_text, translate
from mlm_jax.checkpoint.megatron_script import UNKNOWN, Script
from mlm_jax.config import defaults
from mlm_jax.door import load_config
from mlm_jax.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden" / "megatron"
LEAST = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --lr 1e-3"


def words(text: str) -> list[str]:
    return [w for command in Script(text).commands for w in command.words]


def loaded(flags: str, tmp_path: Path, gpus: int | None = None):
    """The run of a config file that was written from these flags, and the translation."""
    t = translate(flags, gpus)
    file = tmp_path / "converted.py"
    file.write_text(config_text(t, "x.sh"))
    return load_config(file), t


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a 'b c' \"d $x\" e\\ f # g", ["a", "b c", "d \0$x", "e f"]),
        ("X=1\nY=${X}2 Z=${Q:-$X}\np $Y $Z ${Q-no}", ["p", "12", "1", "no"]),
        ("A=(--a 1 # no\n --b \"2 3\")\nA+=(--c)\np ${A[@]}",
         ["p", "--a", "1", "--b", "2", "3", "--c"]),
        ("A=(--b \"2 3\")\np \"${A[@]}\"", ["p", "--b", "2 3"]),
        ("O=\"--a 1 \\\n  --b 2\"\np $O \"$O\"", ["p", "--a", "1", "--b", "2", "--a 1   --b 2"]),
        ("p --a $1 \"$@\" $* --b `x y` > log 2>&1 && q",
         ["p", "--a", "\0$1", "--b", "\0`x\u00a0y`", "q"]),
        ("N=$((2 * 3))\np --n=$N", ["p", "--n=\0$((2\u00a0*\u00a03))"]),
        ("X=a#b\np $X it\\\n2", ["p", "a#b", "it2"]),
        ("p 'open", ["p", "open"]),
        ("p \"open $(x", ["p", "open \0$(x"]),
        ("p $ \\", ["p", "$"]),
    ],
)  # fmt: skip
def test_words_are_a_shells(text, expected):
    assert words(text) == expected


def test_words_are_those_of_bash():
    """Where nothing comes from outside, what bash itself passes on."""
    text = (GOLDEN / "llama3_8b.sh").read_text().partition("if [")[0]
    text += '\nshow "${MODEL_ARGS[@]}" $TRAINING --data $DATA_ARG \'--x=a  b\' --t="$TOKENIZER_ARG"'
    shell = "show() { printf '%s\\n' \"$@\"; }\n" + text
    told = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert [c.words[1:] for c in Script(text).commands] == [told.stdout.splitlines()]


def test_gpt3_175b(tmp_path):
    run, t = loaded((GOLDEN / "gpt3_175b.sh").read_text(), tmp_path)
    m, o = run.model, run.optimizer
    assert (m.n_layers, m.d_model, m.n_heads, m.d_mlp, m.vocab_size) == (
        96,
        12288,
        96,
        49152,
        50257,
    )
    assert (m.positions, m.norm, m.activation, m.bias, m.tied) == (
        "learned", "layernorm", "gelu", True, True,
    )  # fmt: skip
    assert (m.dtype, m.dropout, m.init_std) == ("bfloat16", 0.1, 0.006)
    assert (run.layout.pp, run.layout.tp, run.layout.dp) == (16, 8, 1)
    assert (run.train.accumulate, run.train.seed) == (1536, 1234)
    assert (o.schedule, o.warmup_steps, o.decay_steps, o.b2) == ("cosine", 430, 430000, 0.95)
    assert run.data.cross_document_attention
    assert run.data.epochs == "together"
    assert {"fp16", "rampup-batch-size", "data-path", "load"} <= t.lost.keys()
    assert "set data.path" in t.lost["data-path"]
    assert "attention-dropout 0.1 (its default)" in t.lost
    assert t.needless.keys() == {"attention-backend", "save", "tensorboard-dir"}


def test_llama3_8b(tmp_path):
    run, t = loaded((GOLDEN / "llama3_8b.sh").read_text(), tmp_path)
    m, layout, o = run.model, run.layout, run.optimizer
    assert (m.n_kv_heads, m.d_mlp, m.head_dim, m.vocab_size) == (8, 14336, 128, 128256)
    assert (m.norm, m.norm_zero_centered, m.activation, m.bias) == (
        "rmsnorm",
        True,
        "swiglu",
        False,
    )
    assert (m.rope_scaling, m.rope_factor, m.rope_original_seq_len) == ("llama3", 8, 8192)
    assert (m.rotary_base, m.tied, m.dropout) == (500000, False, 0.0)
    assert (layout.dp, layout.tp, layout.cp, layout.zero) == (4, 2, 2, 1)
    assert layout.sequence_parallel
    assert (run.train.steps, run.train.accumulate, run.train.remat) == (15258, 32, "selective")
    assert o.embedding_lr_scale == o.head_lr_scale == pytest.approx(5e-4 / 1.5e-4)
    assert run.data.path == "0.7 data/web_text_document 0.3 data/code_text_document"
    assert not run.data.cross_document_attention
    assert run.data.resets_positions
    assert not run.data.masks_boundaries
    assert t.lost.keys() - {"decoupled-min-lr", "grad-reduce-in-bf16"} == {
        "line 49: if [ -n $FP8 ]"
    }


def test_the_file_says_only_what_differs_from_defaults():
    t = translate(LEAST)
    scope: dict = {}
    exec(config_text(t, 'a"""\nimport os\n.sh'), scope)
    cfg = scope["get_config"]()
    assert "os" not in scope
    for key, (value, _) in t.settings.items():
        section, _, name = key.partition(".")
        assert cfg[section][name] == value != defaults()[section][name]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--swiglu", {"model.d_mlp": 128, "model.activation": "swiglu"}),
        ("--disable-bias-linear", {"model.activation": "gelu_exact", "model.norm_bias": True,
                                   "model.bias": False}),
        ("--disable-bias-linear --add-qkv-bias", {"model.qkv_bias": True, "model.o_bias": False}),
        ("--no-bias-gelu-fusion", {"model.activation": "gelu_exact"}),
        ("--squared-relu", {"model.activation": "squared_relu"}),
        ("--group-query-attention", {"model.n_kv_heads": 1}),
        ("--num-query-groups 2", {"model.n_kv_heads": 4}),
        ("--kv-channels 8 --qk-layernorm", {"model.head_dim": 8, "model.qk_norm": True}),
        ("--window-size 31,0 --window-attn-skip-freq 2",
         {"model.window": 32, "model.global_every": 2}),
        ("--window-size 127,-1", {"model.window": None}),
        ("--no-position-embedding --reset-position-ids",
         {"model.positions": "none", "data.reset_positions": None}),
        ("--position-embedding-type rope --rotary-percent 0.5 --no-rope-freq 2",
         {"model.rotary_share": 0.5, "model.nope_every": 2}),
        ("--use-rotary-position-embeddings --rotary-seq-len-interpolation-factor 4",
         {"model.rope_scaling": "linear", "model.rope_factor": 4}),
        ("--tokenizer-type NullTokenizer --vocab-size 999", {"model.vocab_size": 1000}),
        ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 1",
         {"layout.pp": 2, "layout.chunks": None}),
        ("--num-layers 8 --pipeline-model-parallel-size 2"
         " --num-layers-per-virtual-pipeline-stage 2",
         {"layout.chunks": 2}),
        ("--sequence-parallel --use-distributed-optimizer",
         {"layout.sequence_parallel": None, "layout.preset": "zero1"}),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params",
         {"layout.preset": "zero3"}),
        ("--context-parallel-size 2 --cp-comm-type allgather",
         {"layout.cp_attention": "all_gather"}),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
         {"train.remat": "full"}),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 5 --lr-wsd-decay-style minus_sqrt"
         " --train-iters 99",
         {"optimizer.schedule": "wsd", "optimizer.wsd_decay_steps": 5,
          "optimizer.wsd_decay_style": "minus_sqrt", "train.steps": 99}),
        ("--lr-decay-style constant --min-lr 1e-5", {"optimizer.min_lr": 0.0}),
        ("--lr-decay-style inverse-square-root", {"optimizer.schedule": "inverse_sqrt"}),
        ("--optimizer sgd --sgd-momentum 0.8", {"optimizer.momentum": 0.8, "optimizer.b2": 0.95}),
        ("--optimizer adam", {"optimizer.b2": 0.999, "optimizer.weight_decay": 0.01}),
        ("--start-weight-decay 0.01 --end-weight-decay 0.1 --weight-decay-incr-style cosine",
         {"optimizer.weight_decay": 0.01, "optimizer.weight_decay_end": 0.1}),
        ("--train-data-path a b --valid-data-path c --split 1,0,0",
         {"data.path": "a b", "data.valid_path": "c", "data.split": "969,30,1"}),
        ("--eod-mask-loss --reset-position-ids", {"data.masks_boundaries": True,
                                                  "data.resets_positions": True}),
        ("--fim-data --fim-rate 0.9", {"data.objective": "fim", "data.fim_rate": 0.9}),
        ("--save-interval 7 --wandb-project p", {"checkpoint.every": 7, "watch.wandb": "p"}),
    ],
)  # fmt: skip
def test_flags_and_what_they_mean_together(flags, expected, tmp_path):
    run, _ = loaded(f"{LEAST} {flags}", tmp_path)
    found = {}
    for key in expected:
        section, _, name = key.partition(".")
        found[key] = getattr(getattr(run, section), name)
    assert found == expected


def test_microbatches_need_the_number_of_gpus(tmp_path):
    flags = f"{LEAST} --micro-batch-size 2 --global-batch-size 64 --tensor-model-parallel-size 2"
    run, t = loaded(flags, tmp_path)
    assert run.train.accumulate == 1
    assert "--gpus" in t.lost["micro-batch-size"]
    run, t = loaded(flags, tmp_path, gpus=8)
    assert (run.train.accumulate, run.layout.dp) == (8, 4)
    assert "micro-batch-size" not in t.lost


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--num-experts 8 --quick-geglu", ["--num-experts 8: mixtures", "--quick-geglu: "]),
        ("--multi-latent-attention", ["--multi-latent-attention"]),
        ("--position-embedding-type mrope", ["mrope: there are learned_absolute, rope"]),
        ("--vocab-extra-ids 100", ["no T5"]),
        ("--num-layers=x", ["--num-layers x: a number is expected"]),
        ("--num-layers", ["--num-layers True: a number is expected"]),
        ("--window-attn-skip-freq 1,0 --window-size 8,0", ["every n-th layer"]),
        ("--normalization L1", ["--normalization L1: there are"]),
        ("--tensor-model-parallel-size 3", ["does not divide 8 GPUs"]),
        ("--micro-batch-size 3 --global-batch-size 64", ["--micro-batch-size 3 on 8"]),
        ("--hidden-size 63", ["model.d_model=63"]),
        ("--train-iters 1.5", ["train.steps=1.5"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(flags, told):
    with pytest.raises(ConfigError) as error:
        translate(f"torchrun --nproc_per_node 8 pretrain_gpt.py {LEAST} {flags}")
    assert all(part in str(error.value) for part in told)


@pytest.mark.parametrize("name", ["bert", "t5", "mamba"])
def test_scripts_of_other_models_are_refused(name):
    with pytest.raises(ConfigError, match=f"pretrain_{name}.py trains a"):
        translate(f"torchrun examples/{name}/pretrain_{name}.py {LEAST}")


@pytest.mark.parametrize("text", ["", "echo hello", "python x.py", "\0\1(", "((((", "$((", "${"])
def test_no_script_of_training(text):
    with pytest.raises(ConfigError, match="no flags of Megatron-LM"):
        translate(text)


def test_what_is_missing_is_told_at_once():
    with pytest.raises(
        ConfigError, match="--num-layers, --num-attention-heads, --seq-length: needed"
    ):
        translate("--hidden-size 64 --num-layers $LAYERS")


def test_every_flag_is_accounted_for():
    t = translate(f"{LEAST} --no-such-flag 3 --moe-router-topk 2 --save $1 --finetune --load a")
    assert "counterpart" in t.lost["no-such-flag"]
    assert "experts" in t.lost["moe-router-topk"]
    assert "init_from=W" in t.lost["load"]
    assert "save" in t.needless
    assert UNKNOWN not in config_text(t, "x.sh")


def test_a_command_inside_quotes_and_strings(tmp_path):
    script = f'opts="{LEAST} \\\n --bf16"\ncmd="python -u $DIR/pretrain_gpt.py ${{opts}}"\n'
    script += 'srun sh -c "$cmd"'
    run, _ = loaded(script, tmp_path)
    assert (run.model.n_layers, run.model.dtype) == (2, "bfloat16")


def test_the_command(tmp_path, monkeypatch, capsys):
    import io

    from mlm_jax.commands.convert_megatron_args import from_megatron_args

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{LEAST} --fp16"))
    assert from_megatron_args(["-"]) == 0
    out, err = capsys.readouterr()
    assert "cfg.model.n_layers = 2  # --num-layers" in out
    assert "--fp16: bfloat16 is used" in err
    assert "--fp16: bfloat16 is used" in out
    with pytest.raises(ConfigError, match="no text that can be read"):
        from_megatron_args([str(tmp_path / "none.sh")])
