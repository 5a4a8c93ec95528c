"""The door as a person meets it: words in; a status, and one message or a result, out."""

import importlib.util
import itertools
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

import mlm_jax.commands.train
import mlm_jax.loop
from mlm_jax.__main__ import main
from mlm_jax.checkpoint.manager import Checkpoints
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.indexed_writer import IndexedWriter
from mlm_jax.errors import DataError, MlmJaxError
from mlm_jax.loop import Outcome
from mlm_jax.metrics import read_rows
from mlm_jax.summary import summary

TOKENIZER = Path(__file__).parents[1] / "golden" / "data" / "tokenizer"
SIZES = {
    "model.n_layers": 2, "model.d_model": 32, "model.seq_len": 64, "train.steps": 4,
    "train.global_batch_size": 8, "train.eval_batches": 1, "checkpoint.every": 2,
    "optimizer.warmup_steps": 0, "layout.preset": "single",
}  # fmt: skip
TINY = ["train", "--config", "quickstart", *(f"--config.{k}={v}" for k, v in SIZES.items())]

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _this_process_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(mlm_jax.commands.train, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(logging.getLogger("mlm_jax"), "level", logging.NOTSET)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The workdir of four steps on the built-in corpus, with checkpoints 2 and 4."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert main([*TINY, "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here, capsys) -> Refused:
    """refused("train", ...): what the only message says; what is in this folder has not changed."""

    def refuse(*words: object) -> str:
        before = contents(here)
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        assert contents(here) == before
        assert out == ""
        assert err.startswith("mlm-jax: ")
        assert err.count("mlm-jax: ") == 1
        assert "Traceback" not in err
        return err.removeprefix("mlm-jax: ").rstrip("\n")

    return refuse


def contents(folder: Path) -> Mapping[str, bytes | None]:
    """What is in a folder, byte for byte; None: a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def done(*words: object) -> int:
    return main([str(word) for word in words])


# Words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian", "'trian' is no command; did you mean train?"),
        ("frobnicate", "'frobnicate' is no command; there are train, generate, explain, data"),
        ("''", "'' is no command"),
        ("--config quickstart", "'--config' is no command"),
        ("train", "required: --config, --workdir"),
        ("train --config quickstart", "required: --workdir"),
        ("train --workdir run", "required: --config"),
        ("train --config= --workdir run", "no config ''"),
        ("train --config gpt22 --workdir run", "did you mean gpt2?"),
        ("generate --workdir run", "required: --prompt"),
        ("generate --prompt x", "--workdir --hf is required"),
        ("explain", "required: --config"),
        ("data", "required: action"),
        ("data bild", "invalid choice: 'bild'"),
        ("data build", "required: --input, --tokenizer, --output"),
        ("data inspect", "required: prefix"),
    ],
)
def test_a_request_that_cannot_be_read_is_refused(refused, words, said):
    assert said in refused(*shlex.split(words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("extra", "unrecognized arguments: extra"),
        ("--workdir=", "--workdir: it is empty"),  # a variable that is not set, not this folder
        ("--confg.train.steps=3", "unrecognized arguments: --confg.train.steps=3"),
        ("--config.train.steps", "--config.train.steps has no value; give --config.train.steps="),
        ("--config.train.steps --config.train.seed=3", "--config.train.steps has no value"),
        ("--config.=3", "unrecognized arguments: --config.=3"),
        ("--config.train.stpes=3", "train.stpes is no setting; did you mean train.steps"),
        ("--config.model.steps=3", "model.steps is no setting; did you mean train.steps"),
        ("--config.train.steps=ten", "train.steps='ten' is not a whole number"),
        ("--config.train.steps=0", "train.steps=0 is not at least 1"),
        ("--config.train.steps=", "train.steps='' is not a whole number"),
        ("--config.data.path=", "data.path='' is not text"),
        ("--config.model.n_heads=3", "model.n_heads=3; try n_heads 2 or 4"),
        ("--config.data.split=9,1", "data.split='9,1' does nothing"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(refused, words, said):
    assert said in refused(*TINY, "--workdir", "run", *shlex.split(words))


def test_every_setting_that_cannot_be_used_is_in_the_message(refused):
    wrong = ["--config.train.steps=ten", "--config.model.norm", "rms", "--config.modle.x=1"]
    message = refused(*TINY, *wrong, "--workdir", "run")
    assert message.startswith("3 settings cannot be used:\n")
    assert [line.split("=")[0].split()[0] for line in message.splitlines()[1:]] == [
        "model.norm", "modle.x", "train.steps",
    ]  # fmt: skip


def test_an_option_that_is_almost_right_is_recognised(refused):
    message = refused(*TINY, "--workdir=run", "--help-confg")
    assert message.startswith("unrecognized arguments: --help-confg; did you mean --help-config?")


def test_settings_come_in_any_order_and_with_or_without_equals(here, capsys):
    parts = [["--config", "llama:tiny"], ["--config.layout.tp=2"], ["--config.model.d_model", "64"]]
    tables = set()
    for order in itertools.permutations(parts):
        assert done("explain", *itertools.chain(*order)) == 0
        tables.add(capsys.readouterr().out)
    assert len(tables) == 1
    assert "tp=2" in tables.pop()
    assert done("explain", "--config", "llama:tiny", "--config.layout.dp", "-1") == 0  # a value


@pytest.mark.parametrize(
    "words", [["--help"], ["-h"], ["train", "--help"], ["data", "--help"], ["checkpoint", "--help"]]
)
def test_help_goes_to_stdout_without_the_indents_of_a_docstring(words, capsys):
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    assert "usage: mlm-jax" in out
    assert "\n    Trains" not in out
    assert "\n    build:" not in out


def test_no_word_at_all_shows_the_usage_as_a_mistake(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage: mlm-jax COMMAND" in err


def test_help_config_lists_every_setting_with_its_choices(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help-config"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "(layernorm | rmsnorm)" in lines["model.norm"]
    assert "(int | None)" in lines["model.n_kv_heads"]
    assert (
        "(single | dp | zero1 | zero2 | zero3 | fsdp | hybrid | tp | tp_sp | fsdp_tp | None)"
        in lines["layout.preset"]
    )
    assert "(table)" in lines["layout.rules"]
    assert lines.keys() == mlm_jax.config.KEYS.keys()


# Layouts


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layout.tp": 8}, "model.n_heads = 4 does not divide by layout.tp = 8; try n_heads 8"),
        ({"layout.tp": 3}, "tp=3 takes 3 devices at a time, which does not divide the 8"),
        ({"layout.tp": 16}, "tp=16 takes 16 devices"),
        ({"layout.dp": 2}, "dp=2 takes 2 of 8 devices; try dp=8"),
        ({"layout.dp": -1, "layout.tp": -1}, "at most one takes the rest"),
        (
            {"train.global_batch_size": 4},
            "= 4 does not divide by layout.dp = 8; try global_batch_size 8",
        ),
        ({"train.accumulate": 2}, "= 4 does not divide by layout.dp = 8"),
        ({"layout.pp": 2}, "a pipeline needs layout.pp = 2 at least; try accumulate 2"),
        ({"layout.sequence_parallel": 1}, "does nothing with layout.tp=1"),
        ({"layout.rules": "mpl=tp"}, "no array has a dim 'mpl'; try mlp"),
        ({"layout.rules": "mlp=pt"}, "'pt' is no mesh axis"),
        ({"layout.weights": "up=embed,nope"}, "'nope' has no rule"),
        ({"layout.weights": "(=embed,mlp"}, "'(' is no regular expression"),
        (
            {"layout.weights": "mlp.upp=layer,embed,mlp"},
            "layout.weights: no weight is called ['mlp.upp']",
        ),
        ({"layout.weights": "mlp.up=embed"}, "has shape (2, 32, 128)"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_is_refused(refused, settings, said):
    settings = {"layout.preset": "None"} | settings
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    assert said in refused(*TINY, *words, "--workdir", "run")


def test_explain_shows_any_number_of_devices_at_once(capsys):
    layout = ["--config.layout.fsdp=64", "--config.layout.tp=8"]
    assert done("explain", "--config", "llama:3-8b", "--devices", 512, *layout) == 0
    out = capsys.readouterr().out
    up = next(line for line in out.splitlines() if line.startswith("blocks.mlp.up"))
    assert up.split()[1:5] == ["32x4096x14336", "layer", "embed", "mlp"]
    assert "embed=fsdp; mlp=tp" in up
    assert up.endswith(f"{32 * 4096 * 14336 * 4 // 512:,}")
    assert "8,030,261,248 parameters; mesh pp=1 dp=1 fsdp=64 ep=1 cp=1 tp=8" in out


@pytest.mark.parametrize(
    ("words", "times"),
    [
        ("--config.layout.dp=8", 3),
        ("--config.layout.dp=8 --config.layout.zero=1", 1 + 2 / 8),
        ("--config.layout.dp=8 --config.optimizer.moment_dtype=bfloat16", 2.5),
        ("--config.layout.dp=8 --config.optimizer.name=lion", 2),
        ("--config.layout.fsdp=8 --config.optimizer.name=adafactor", 1),
    ],
)
def test_explain_says_what_weights_and_optimizer_take(words, times, capsys):
    assert done("explain", "--config", "llama:3-8b", *shlex.split(words)) == 0
    held = re.search(r"([\d.]+) GiB of weights .* ([\d.]+) with the", capsys.readouterr().out)
    assert float(held[2]) == pytest.approx(float(held[1]) * times, rel=5e-3)


def test_explain_imagines_as_many_devices_as_the_sizes_take(capsys):
    assert done("explain", "--config", "gpt2", "--config.layout.fsdp=4") == 0
    assert "fsdp=4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--devices 0", "--devices 0 must be at least 1"),
        ("--devices -1", "--devices -1 must be at least 1"),
        ("--devices many", "invalid int value: 'many'"),
        ("--devices 3 --config.layout.tp=2", "does not divide the 3"),
        ("--config.layout.preset=fsdp_tp", "--devices N"),
        ("--workdir x", "unrecognized arguments: --workdir x"),
    ],
)
def test_explain_refuses_devices_that_cannot_be(refused, words, said):
    assert said in refused("explain", "--config", "quickstart", *shlex.split(words))


# Data


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Token files, whole and broken."""
    folder = tmp_path_factory.mktemp("files")
    ids = np.random.default_rng(0).integers(0, 2048, (100, 80))
    documents = {
        "good": ids, "five": ids[:5], "empty": [], "hollow": [[], []], "short": [[1, 2, 3]] * 100,
        "beyond": [*ids[:99], [1, 2048, 3]], "cut": ids, "garbage": ids, "alone": ids,
    }  # fmt: skip
    for name, sequences in documents.items():
        write(folder / name, sequences, "uint16")
    write(folder / "negative", [[1, -2, 3]] * 100, "int32")
    write(folder / "floats", [[1.5, 2.5]] * 100, "float32")
    (folder / "cut.bin").write_bytes((folder / "cut.bin").read_bytes()[:-7])
    (folder / "garbage.idx").write_bytes(b"not an index at all" * 9)
    (folder / "alone.bin").unlink()
    return folder


def write(prefix: Path, sequences, dtype: str) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for sequence in sequences:
            writer.add_document([sequence])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "missing.idx: no such file"),
        ("alone", "alone.bin: no such file"),
        ("empty", "holds no tokens"),
        ("hollow", "holds no tokens"),
        ("short", "tokens are too few for one sample of 65"),
        ("five", "data.split='969,30,1' leaves none of 5 documents for validation"),
        ("cut", "cut.bin: 15993 bytes, where its .idx has 8000 uint16 tokens: 16000"),
        ("garbage", "garbage.idx: it does not begin as the index of a dataset does"),
        ("beyond", "token id 2048, beyond model.vocab_size=2048; set model.vocab_size"),
        ("negative", "token id -2"),
        ("floats", "float32 values are not token ids"),
        ("good.bin", "; try {files}/good"),
        ("good.idx", "; try {files}/good"),
        (".", "; try {files}/alone or {files}/beyond or {files}/cut"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(refused, files, name, said):
    message = refused(*TINY, f"--config.data.path={files / name}", "--workdir", "run")
    assert said.format(files=files) in message


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("a,b", "data.split: split 'a,b' cannot be read; give one to three weights"),
        ("1,1,1,1", "cannot be read"),
        ("-1,2", "cannot be read"),
        ("0,1", "data.split"),
        ("100 1e-9", "leaves none of 5 documents for validation"),
        ("969,30 1", "leaves none of 5 documents for validation"),
        ("969,,1", "leaves none of 5 documents for validation"),
    ],
)
def test_a_split_that_cannot_be_is_refused(refused, files, split, said):
    words = [f"--config.data.path={files / 'five'}", f"--config.data.split={split}"]
    assert said in refused(*TINY, *words, "--workdir", "run")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere", "data.tokenizer='nowhere': nowhere: no such file"),
        (__file__, "this tokenizer cannot be read"),
        (TOKENIZER, "model.vocab_size=2048 is smaller than the tokenizer's 8192; try model.vocab"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(refused, files, path, said):
    data = [f"--config.data.path={files / 'good'}", f"--config.data.tokenizer={path}"]
    assert said in refused(*TINY, *data, "--workdir", "run")


def test_a_vocabulary_too_small_for_the_builtin_corpus_is_refused(refused):
    message = refused(*TINY, "--config.model.vocab_size=200", "--workdir", "run")
    assert message.startswith("model.vocab_size=200 is too small for the built-in corpus")


# Building and inspecting data


@pytest.fixture
def texts(here) -> Path:
    """Inputs to build from, good and bad, in this folder."""
    lines = {
        "good.jsonl": b'{"text": "hello world"}\n\n{"text": "second"}\n',
        "more.jsonl": b'{"text": "third"}\n',
        "words.jsonl": b"hello world\n",
        "list.jsonl": b'["hello"]\n',
        "other.jsonl": b'{"body": "hello"}\n',
        "latin.jsonl": b'{"text": "\xe9"}\n',
        "blank.jsonl": b"\n\n",
        "plain.txt": b"plain text",
    }
    for name, line in lines.items():
        (here / name).write_bytes(line)
    return here


def build(*words: object, output: str = "out") -> list[str]:
    return ["data", "build", "--tokenizer", str(TOKENIZER), "--output", output, *map(str, words)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--input nowhere.jsonl", "nowhere.jsonl: cannot be read: No such file"),
        ("--input .", "cannot be read: Is a directory"),
        ("--input words.jsonl", "words.jsonl, line 1: not JSON"),
        ("--input list.jsonl", "list.jsonl, line 1: a list; a line has one JSON object"),
        ("--input other.jsonl", "it lacks a text under 'text'; there is body (str)"),
        (
            "--input good.jsonl --json_keys body",
            "lacks a text under 'body'; there is text (str)",
        ),
        ("--input latin.jsonl", "latin.jsonl, line 1: not UTF-8"),
        ("--input blank.jsonl", "there are no documents to write"),
        ("--input words.jsonl good.jsonl", "words.jsonl, line 1: not JSON"),
        ("--input good.jsonl --append-eod", "did you mean --append_eod?"),
        ("--input good.jsonl --tokenizer nowhere", "nowhere: no such file"),
        ("--input good.jsonl --tokenizer good.jsonl", "this tokenizer cannot be read"),
        ("--input good.jsonl --output plain.txt/out", "cannot be written"),
        ("--input good.jsonl --output=", "--output: it is empty"),
        ("--input good.jsonl --config.data.path=x", "unrecognized arguments: --config.data.path=x"),
    ],
)
def test_texts_that_cannot_be_built_from_are_refused(texts, refused, words, said):
    assert said in refused(*build(), *shlex.split(words))


def test_data_is_built_from_all_inputs_and_never_over_other_data(texts, refused, capsys):
    assert main(build("--input", "good.jsonl", "plain.txt", "--input", "more.jsonl")) == 0
    out = capsys.readouterr().out
    assert out.startswith("4 documents, ")
    assert out.endswith("--config.data.path=out_text_document\n")
    assert len(IndexedDataset("out_text_document")) == 4
    assert "already exists" in refused(*build("--input", "good.jsonl"))


def test_inspect_tells_what_is_in_a_dataset(texts, capsys):
    main(build("--input", "good.jsonl", "--append_eod"))
    capsys.readouterr()
    assert done("data", "inspect", "out_text_document", "--tokenizer", TOKENIZER) == 0
    out = capsys.readouterr().out
    assert "2 documents, 2 sequences" in out
    assert "'hello world<|endoftext|>'" in out


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("missing", "", "missing.idx: no such file"),
        ("good.bin", "", "is named by PREFIX alone"),
        ("cut", "", "15993 bytes"),
        ("garbage", "", "it does not begin as the index"),
        ("good", "extra", "unrecognized arguments: extra"),
        ("good", "--config.data.path=x", "unrecognized arguments"),
        ("good", "--tokenizer nowhere", "nowhere: no such file"),
    ],
)
def test_a_dataset_that_cannot_be_inspected_is_refused(refused, files, name, words, said):
    assert said in refused("data", "inspect", files / name, *shlex.split(words))


@pytest.mark.parametrize("name", ["negative", "floats"])
def test_tokens_of_another_tokenizer_are_not_shown_as_text(here, files, name, capsys):
    assert done("data", "inspect", files / name, "--tokenizer", TOKENIZER) == 2
    assert str(files / name) in capsys.readouterr().err


# Workdirs


def test_a_run_ends_with_its_result_and_its_folder_is_complete(trained):
    names = {path.name for path in trained.iterdir()}
    whole = {"config.json", "metrics.jsonl", "checkpoints", "tokenizer", "report.html"}
    assert names == whole | {"tensorboard", "lock"}
    with Checkpoints(trained) as checkpoints:
        assert checkpoints.latest() == 4
    assert read_rows(trained / "metrics.jsonl")[-1]["step"] == 4


def test_a_finished_run_shows_its_result_again_and_trains_no_more(trained, capsys):
    before = contents(trained / "checkpoints")
    assert done(*TINY, "--workdir", trained) == 0
    out, err = capsys.readouterr()
    assert "bits per byte of held-out text at step 4" in out
    assert f"mlm-jax generate --workdir {trained}" in out
    assert "Traceback" not in err
    assert contents(trained / "checkpoints") == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.n_layers": 3}, "model.n_layers is 2 there, 3 here"),
        ({"model.d_model": 64}, "model.d_mlp is 128 there, 256 here"),
        ({"train.seed": 1}, "train.seed is 0 there, 1 here"),
        ({"train.global_batch_size": 16}, "train.global_batch_size is 8 there, 16 here"),
        ({"train.steps": 3}, "is at step 4, beyond train.steps=3"),
    ],
)
def test_a_workdir_of_another_run_is_refused(refused, here, trained, settings, said):
    shutil.copytree(trained, here / "run")
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    assert said in refused(*TINY, *words, "--workdir", "run")


def test_a_workdir_that_is_no_folder_is_refused(refused, here):
    (here / "file").write_text("mine")
    for name in ("file", "file/run"):
        assert f"{name} is no folder that can be written" in refused(*TINY, "--workdir", name)
    (here / "run" / "checkpoints" / "2").mkdir(parents=True)
    assert "has checkpoints but no config.json" in refused(*TINY, "--workdir", "run")


DAMAGED = {
    "": "cannot be read",
    "\xff": "cannot be read",
    "{}": "cannot be read",
    "[]": "cannot be read",
    "5": "cannot be read",
    '{"format": 2}': "has format 2; this version reads format 1",
    '{"format": 1, "model": 5}': "model is no group of settings",
    '{"format": 1, "model": {"n_layer": 2}}': "model.n_layer is no setting",
    '{"format": 1, "model": {"n_layers": "two"}}': "model.n_layers='two' is not a whole number",
}


@pytest.mark.parametrize("text", DAMAGED)
@pytest.mark.parametrize("words", [TINY, ["generate", "--prompt", "x"]], ids=lambda words: words[0])
def test_a_damaged_config_json_is_refused_by_name(refused, here, words, text):
    (here / "run").mkdir()
    (here / "run" / "config.json").write_bytes(text.encode("latin-1"))
    message = refused(*words, "--workdir", "run")
    assert message.startswith("run/config.json")
    assert DAMAGED[text] in message


# Profiles


def test_a_profile_of_two_steps_is_beside_the_report_and_rows_have_what_is_watched(here, capsys):
    watch = ["--config.watch.groups=true", "--config.watch.activations=true"]
    assert done(*TINY, *watch, "--workdir", "run", "--profile", "2:4") == 0
    assert f"Profile: {Path('run/profile/operations.txt')}" in capsys.readouterr().out
    content = json.loads((here / "run" / "profile" / "operations.json").read_text())
    assert content["steps"] == [2, 3]
    origins = {row["origin"] for row in content["operations"]}
    for scope in ("forward mlp", "backward attention", "backward head", "optimizer"):
        assert any(origin.startswith(scope) for origin in origins), origins
    row = next(row for row in read_rows(Path("run/metrics.jsonl")) if row["kind"] == "train")
    assert row["grad_norms"]["blocks.mlp.up"] > 0
    assert len(row["by_layer"]["activation_rms"]["blocks"]) == 2
    assert "blocks.mlp.up" in Path("run/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--profile", "expected one argument"),
        ("--profile ''", "'' is no range of steps; 10:13 are the steps 10, 11 and 12"),
        ("--profile 3", "'3' is no range of steps"),
        ("--profile 0:2", "'0:2' is no range of steps"),
        ("--profile 3:3", "'3:3' is no range of steps"),
        ("--profile 4:6", "--profile 4:6: this run takes the steps 1 to 4; try --profile 1:4"),
    ],
)
def test_steps_that_cannot_be_profiled_are_refused(refused, words, said):
    assert said in refused(*TINY, "--workdir", "run", *shlex.split(words))


def test_a_board_that_is_not_installed_is_refused_before_there_is_a_folder(refused, monkeypatch):
    find_spec = importlib.util.find_spec
    hide = lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    message = refused(*TINY, "--config.watch.wandb=mine", "--workdir", "run")
    assert message.startswith("watch.wandb='mine' needs a package that is not installed")


def test_a_finished_run_has_no_steps_to_profile(refused, here, trained):
    shutil.copytree(trained, here / "run")
    message = refused(*TINY, "--workdir", "run", "--profile", "2:4")
    assert "--profile 2:4: no step is left of train.steps=4; raise it" in message


# Generating


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--max_tokens 0", "max_tokens=0 must be at least 1"),
        ("--max_tokens 64", "with max_tokens=64 they exceed the context of 64; try max_tokens="),
        ("--max_tokens few", "invalid int value: 'few'"),
        ("--temperature -1", "temperature=-1.0 must be"),
        ("--temperature nan", "temperature=nan must be"),
        ("--top_k -1", "top_k=-1 must be at least 0"),
        ("--top_k 99999999999", "top_k=99999999999 must be"),
        ("--top_p 0", "top_p=0.0 must be above 0 and at most 1"),
        ("--top_p 1.1", "top_p=1.1 must be"),
        ("--repetition_penalty 0", "repetition_penalty=0.0 must be above 0"),
        ("--seed -1", "seed=-1 must be"),
        (f"--seed {2**32}", f"seed={2**32} must be"),
        ("--seed 1.5", "invalid int value: '1.5'"),
        ("--step 3", "has no step 3; it has [2, 4]"),
        ("--step newest", "invalid int value: 'newest'"),
        (f"--prompt '{'x ' * 99}'", "tokens, the context is 64; shorten it"),
        (
            "--prompt '\udcff'",
            "prompt 1 is not valid Unicode",
        ),  # a byte that is no UTF-8, as argv has it
        ("--config.model.n_layers=3", "model.n_layers: only layout.* can be set"),
        ("--config.layout.tp=3", "does not divide the 8"),
        ("--config.layout.tp=8", "model.n_heads = 4 does not divide by layout.tp = 8"),
        ("--config.layout.tpp=2", "layout.tpp is no setting; did you mean layout.tp"),
        ("--config gpt2", "unrecognized arguments: --config gpt2"),
    ],
)
def test_what_cannot_be_generated_is_refused(refused, trained, words, said):
    before = contents(trained)
    message = refused("generate", "--workdir", trained, "--prompt", "def", *shlex.split(words))
    assert said in message
    assert contents(trained) == before


def test_all_that_is_wrong_with_sampling_is_in_one_message(refused, trained):
    wrong = ["--temperature=-1", "--top_p=2", "--seed=-1", "--max_tokens=0"]
    message = refused("generate", "--workdir", trained, "--prompt", "x", *wrong)
    assert all(name in message for name in ("temperature", "top_p", "seed", "max_tokens"))


@pytest.mark.parametrize("name", ["nowhere", "empty", "file", "file/run"])
def test_generate_refuses_a_folder_without_a_run(refused, here, name):
    (here / "empty").mkdir()
    (here / "file").write_text("mine")
    assert name in refused("generate", "--workdir", name, "--prompt", "x")


def test_generate_refuses_a_run_without_a_checkpoint(refused, here, trained):
    shutil.copytree(trained, here / "run", ignore=shutil.ignore_patterns("checkpoints"))
    message = refused("generate", "--workdir", "run", "--prompt", "x")
    assert "holds no checkpoint" in message


def test_generate_refuses_a_damaged_checkpoint_and_says_how_to_go_on(refused, here, trained):
    shutil.copytree(trained, here / "run")
    (here / "run" / "checkpoints" / "4" / "state" / "manifest.ocdbt").unlink()
    message = refused("generate", "--workdir", "run", "--prompt", "x")
    assert "checkpoints/4 is damaged: state/manifest.ocdbt is missing" in message
    assert "older step" in message
    assert len(message) < 700


def test_generate_refuses_a_model_without_a_tokenizer(refused, here, trained):
    shutil.copytree(trained, here / "run", ignore=shutil.ignore_patterns("tokenizer"))
    message = refused("generate", "--workdir", "run", "--prompt", "x")
    assert message.startswith("run: tokenizer/tokenizer.json is missing")
    config = json.loads((here / "run" / "config.json").read_text())
    del config["checksums"]  # as if it had never had one
    (here / "run" / "config.json").write_text(json.dumps(config))
    message = refused("generate", "--workdir", "run", "--prompt", "x")
    assert message.startswith("this model has no tokenizer")


def test_generate_prints_each_prompt_with_its_continuation(here, trained, capsys):
    words = ["generate", "--workdir", trained, "--max_tokens", 4, "--prompt", "def", "--prompt="]
    texts = set()
    for layout in ([], ["--config.layout.tp=2"], ["--config.layout.tp", "2", "--step", 4]):
        assert done(*words, *layout) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1  # the same seed, the same texts, under any layout
    first, second = texts.pop().split("-" * 40 + "\n")
    assert first.startswith("def")
    assert len(first) > len("def\n")
    assert second.endswith("\n")
    assert not contents(here)


# How it ends


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (Outcome(True, 7, None), 75, "stopped on request; saved at step 7."),
        (Outcome(True, 0, None), 75, "stopped on request; nothing was saved yet."),
        (MlmJaxError("ten steps were not finite"), 1, "mlm-jax: ten steps were not finite"),
        (DataError("no data"), 2, "mlm-jax: no data"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=repr,
)
def test_the_status_says_how_a_run_ended(here, monkeypatch, capsys, outcome, status, said):
    def train(*_: object) -> Outcome:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(mlm_jax.loop, "train", train)
    assert done(*TINY, "--workdir", "run") == status
    assert said in "".join(capsys.readouterr())


def test_a_reader_that_goes_away_is_no_failure_to_report(monkeypatch, capsys):
    def leave(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", sys.stdout)  # main closes its own
    monkeypatch.setattr(mlm_jax.loop, "train", leave)
    assert done(*TINY, "--workdir", "run") == 1
    assert capsys.readouterr().err == ""


def test_the_module_is_the_command(here):
    command = [sys.executable, "-m", "mlm_jax", "explain", "--config", "gpt22"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("mlm-jax: no config 'gpt22'; did you mean gpt2? shipped: bert, ")
    assert ended.stderr.count("\n") == 1
    version = [sys.executable, "-m", "mlm_jax", "--version"]
    assert subprocess.run(version, capture_output=True, check=True).stdout == b"mlm-jax 0.1.0\n"


# One's own data, from text to text


def test_own_texts_become_a_model_that_talks(here, trained, capsys):
    lines = (json.dumps({"text": f"document {i}: " + "so it goes. " * 20}) for i in range(40))
    (here / "mine.jsonl").write_text("\n".join(lines))
    tokenizer = trained / "tokenizer"
    words = ["--tokenizer", tokenizer, "--output", "mine", "--append_eod"]
    assert done("data", "build", "--input", "mine.jsonl", *words) == 0
    setting = capsys.readouterr().out.splitlines()[-1]
    data = [setting, f"--config.data.tokenizer={tokenizer}"]
    assert done(*TINY, *data, "--workdir", "run") == 0
    assert "bits per byte of held-out text at step 4" in capsys.readouterr().out
    assert done("generate", "--workdir", "run", "--prompt", "doc", "--max_tokens", 4) == 0
    assert capsys.readouterr().out.startswith("doc")


def test_a_run_without_a_tokenizer_is_not_said_to_generate(here, trained):
    shutil.copytree(trained, here / "run", ignore=shutil.ignore_patterns("tokenizer"))
    assert "mlm-jax generate" in summary(trained)
    assert "mlm-jax generate" not in summary(here / "run")
