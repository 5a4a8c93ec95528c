"""The one door through which settings come in."""

import dataclasses
import json
import re
import runpy
import shlex
import textwrap
from pathlib import Path

import pytest

from mlm_jax.config import KEYS, SECTIONS, RunConfig, defaults
from mlm_jax.door import from_dict, load_config, shipped_configs
from mlm_jax.errors import ConfigError

CONFIGS = sorted(shipped_configs().glob("*.py"))


def specs() -> list[str]:
    """Every shipped config at every size it has."""
    sizes = {path.stem: runpy.run_path(str(path)).get("SIZES", ()) for path in CONFIGS}
    return [f"{name}:{size}" for name in sizes for size in sizes[name]] + [*sizes]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    """A config file that changes nothing."""
    return config_file(tmp_path_factory.mktemp("plain"), "return defaults()")


def config_file(folder: Path, body: str, name: str = "mine.py") -> str:
    """The path of a config file whose get_config(arg) has this body, with `cfg` to begin from."""
    head = (
        "from mlm_jax.config import defaults\ndef get_config(arg='none'):\n    cfg = defaults()\n"
    )
    (folder / name).write_text(head + textwrap.indent(textwrap.dedent(body), "    ") + "\n")
    return str(folder / name)


def refused(spec: str, overrides: dict | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(spec, overrides)
    return str(caught.value)


# What text means


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        *(("train.steps", text, 1000) for text in ("1000", "1_000", "1e3", " 1000 ", "+1000")),
        ("train.steps", 1000.0, 1000),
        ("train.steps", "9007199254740993", 2**53 + 1),  # more digits than a float has
        ("train.seed", str(2**32 - 1), 2**32 - 1),
        ("layout.tp", "-1", -1),
        ("layout.tp", "None", None),
        ("layout.tp", "none", None),
        ("layout.tp", None, None),
        ("optimizer.lr", "1e-3", 0.001),
        ("optimizer.lr", ".5", 0.5),
        ("optimizer.lr", 1, 1.0),
        ("model.dropout", "0", 0.0),
        *(("model.bias", text, False) for text in ("false", "False", "0", "no", False)),
        *(("model.tied", text, True) for text in ("true", "TRUE", "1", "yes", True)),
        ("layout.sequence_parallel", "None", None),
        ("model.norm", "rmsnorm", "rmsnorm"),
        ("layout.preset", "none", None),
        ("data.path", "a b/c=d", "a b/c=d"),
        ("name", "None of that", "None of that"),
        ("layout.rules", "mlp=tp,fsdp; heads=", (("mlp", ("tp", "fsdp")), ("heads", ()))),
        ("layout.rules", " mlp = tp , fsdp ;", (("mlp", ("tp", "fsdp")),)),
        ("layout.rules", {"mlp": ("tp", "dp"), "qk": ()}, (("mlp", ("tp", "dp")), ("qk", ()))),
        ("layout.rules", {"mlp": "tp"}, (("mlp", ("tp",)),)),
        ("layout.rules", [["mlp", ["tp"]]], (("mlp", ("tp",)),)),
        ("layout.rules", "", ()),
        ("layout.weights", "up$=embed,mlp", (("up$", ("embed", "mlp")),)),
    ],
)  # fmt: skip
def test_a_value_is_typed_by_its_setting(plain, key, value, meant):
    run = load_config(plain, {key: value})
    section, _, name = key.rpartition(".")
    typed = getattr(getattr(run, section) if section else run, name)
    assert typed == meant
    assert type(typed) is type(meant)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        *(
            ("train.steps", wrong, "a whole number")
            for wrong in ("ten", "1.5", "0x10", "1e400", "nan", "", "None", "--5", True, None, [1])
        ),
        ("train.steps", 10**400, "a whole number"),
        ("train.steps", "0", "at least 1"),
        ("train.seed", "-1", "at least 0 and below 4294967296"),
        ("train.seed", 2**32, "at least 0 and below 4294967296"),
        ("optimizer.lr", "fast", "a number"),
        ("optimizer.lr", "inf", "at least 0"),
        ("optimizer.lr", False, "a number"),
        ("optimizer.b1", 1, "at least 0.0 and below 1"),
        ("model.dropout", "1", "at least 0 and below 1"),
        *(("model.bias", wrong, "true or false") for wrong in ("maybe", "", "None", 1, None)),
        ("model.norm", "rms", "one of layernorm, rmsnorm; did you mean rmsnorm?"),
        ("model.norm", None, "one of layernorm, rmsnorm"),
        (
            "layout.preset",
            "tp-sp",
            "one of single, dp, zero1, zero2, zero3, fsdp, hybrid, tp, tp_sp, fsdp_tp; did you mean"
            " tp_sp?",
        ),
        ("layout.tp", "0", "a size of 1 or more, or -1"),
        ("layout.tp", -2, "a size of 1 or more, or -1"),
        ("layout.rules", "mlp", "a table like 'mlp=tp,fsdp; heads='"),
        ("layout.rules", 5, "a table"),
        ("layout.rules", {"mlp": None}, "a table"),
        ("name", 5, "text"),
        ("data.path", 5, "text"),
        # An unset variable of the shell is no wish: it would train on the built-in corpus.
        ("data.path", "", "text"),
        ("layout.tp", "", "a whole number"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_wanted(plain, key, value, wanted):
    message = refused(plain, {key: value})
    assert message.startswith(f"a setting cannot be used:\n  {key}=")
    assert f" is not {wanted}" in message
    assert len(message.splitlines()) == 2


def test_every_setting_has_a_meaning_and_a_default_that_is_allowed():
    assert all(field.metadata["doc"] for field in KEYS.values())
    assert from_dict({}) == RunConfig()
    assert {key.partition(".")[0] for key in KEYS} == {*SECTIONS, "init_from", "name"}


def test_a_run_cannot_be_changed_by_accident(plain):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(plain).model.n_layers = 3


# What follows from other settings


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model.d_model": 64}, {"d_mlp": 256, "head_dim": 16, "n_kv_heads": 4}),
        ({"model.d_model": "64", "model.d_mlp": "100"}, {"d_mlp": 100}),
        ({"model.d_mlp": "100", "model.d_model": "64"}, {"d_mlp": 100}),
        ({"model.d_model": 64, "model.d_mlp": "None"}, {"d_mlp": 256}),
        ({"model.n_heads": 8}, {"head_dim": 16, "n_kv_heads": 8}),
        ({"model.n_heads": 3, "model.head_dim": 7}, {"head_dim": 7, "n_kv_heads": 3}),
        ({"model.n_heads": 6, "model.n_kv_heads": 2, "model.head_dim": 8}, {"n_kv_heads": 2}),
    ],
)
def test_sizes_that_are_not_set_follow_from_others(plain, overrides, expected):
    model = dataclasses.asdict(load_config(plain, overrides).model)
    assert expected.items() <= model.items()


def test_a_reference_in_a_config_file_follows_overrides(tmp_path):
    spec = config_file(tmp_path, """
        cfg.model.d_mlp = 3 * cfg.model.get_ref("d_model")
        cfg.optimizer.decay_steps = cfg.train.get_ref("steps")
        return cfg
    """)  # fmt: skip
    assert load_config(spec).model.d_mlp == 384
    run = load_config(spec, {"model.d_model": "64", "train.steps": "1e2"})
    assert (run.model.d_mlp, run.optimizer.decay_steps) == (192, 100)
    run = load_config(spec, {"model.d_mlp": 100, "model.d_model": 64})
    assert (run.model.d_mlp, run.model.d_model) == (100, 64)


# Every problem at once


def test_all_problems_are_reported_together(plain):
    message = refused(plain, {
        "train.steps": "ten", "model.norm": "rms", "modle.n_layers": 1, "train.accumulate": 3,
        "model.n_heads": 3, "layout.tp": 0,
    })  # fmt: skip
    head, *problems = message.splitlines()
    assert head == "6 settings cannot be used:"
    assert [re.match(r"  ([\w.]+)", p)[1] for p in problems] == [
        "layout.tp", "model.d_model", "model.norm", "modle.n_layers",
        "train.global_batch_size", "train.steps",
    ]  # fmt: skip


def test_a_value_that_cannot_be_read_is_not_blamed_twice(plain):
    assert len(refused(plain, {"optimizer.lr": "x", "optimizer.min_lr": 1}).splitlines()) == 2


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("modle.n_layers", ["model.n_layers"]),
        ("model.n_layer", ["model.n_layers"]),
        ("n_layers", ["model.n_layers"]),
        ("train.n_layers", ["model.n_layers"]),
        ("model.steps", ["train.steps"]),
        ("optimizer.learning_rate", []),
        ("config.model.n_layers", ["model.n_layers"]),
        ("model", []),
        ("zzz", []),
        ("", []),
        ("model.n_layers.x", ["model.n_layers"]),
    ],
)
def test_a_key_that_is_no_setting_is_refused_with_what_may_be_meant(plain, key, meant):
    message = refused(plain, {key: 2})
    assert f"  {key} is no setting" in message
    assert all(name in message.partition("did you mean ")[2] for name in meant)


# Settings that contradict each other, or would do nothing


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model.n_heads": 3}, "does not divide by model.n_heads=3; try n_heads 2 or 4"),
        ({"model.d_model": 2}, "model.d_model=2 does not divide by model.n_heads=4"),
        ({"model.n_kv_heads": 3}, "model.n_kv_heads=3 does not divide model.n_heads=4; try 2 or 4"),
        ({"model.n_kv_heads": 8}, "model.n_kv_heads=8 does not divide model.n_heads=4; try 2 or 4"),
        ({"model.positions": "rotary", "model.head_dim": 3}, "model.head_dim=3 is odd"),
        ({"model.rotary_base": 5e5}, "model.rotary_base=500000.0 does nothing"),
        ({"model.attention": "cudnn", "data.cross_document_attention": True}, "try bfloat16"),
        ({"model.attention": "cudnn", "model.dtype": "bfloat16"}, "no mask between packed"),
        ({"train.accumulate": 3}, "does not divide by train.accumulate=3; try accumulate 2 or 4"),
        ({"optimizer.min_lr": 1}, "optimizer.min_lr=1.0 is above optimizer.lr=0.001"),
        ({"optimizer.schedule": "constant", "optimizer.min_lr": 1e-5}, "optimizer.min_lr=1e-05"),
        ({"optimizer.schedule": "constant", "optimizer.decay_steps": 9}, "optimizer.decay_steps=9"),
        ({"optimizer.warmup_steps": 9, "optimizer.decay_steps": 9}, "leaves nothing of"),
        ({"optimizer.schedule": "inverse_sqrt", "optimizer.decay_steps": 9}, "has no last step"),
        ({"optimizer.schedule": "wsd", "train.steps": 500}, "wsd_decay_steps; try 50"),
        (
            {"optimizer.schedule": "wsd", "optimizer.wsd_decay_steps": 8,
             "optimizer.decay_steps": 9, "optimizer.warmup_steps": 4},
            "wsd_decay_steps=8 does not fit into optimizer.decay_steps=9 after"
            " optimizer.warmup_steps=4; try wsd_decay_steps 5",
        ),
        (
            {"optimizer.wsd_decay_steps": 8},
            "wsd_decay_steps=8 does nothing with optimizer.schedule='cosine', but with wsd; leave"
            " it at None",
        ),
        ({"optimizer.wsd_decay_style": "linear"}, "wsd_decay_style='linear' does nothing"),
        ({"optimizer.weight_decay_end": 0.3}, "weight_decay_end=0.3 does nothing with"),
        ({"optimizer.weight_decay_schedule": "linear"}, "without optimizer.weight_decay_end"),
        (
            {"optimizer.weight_decay_schedule": "linear", "optimizer.weight_decay_end": 0.1},
            "weight_decay_end=0.1 is optimizer.weight_decay: nothing changes",
        ),
        (
            {"optimizer.head_lr_scale": 2},
            "head_lr_scale=2.0 does nothing with model.tied=True: the embedding's table is the"
            " head; set optimizer.embedding_lr_scale",
        ),
        *(
            ({"optimizer.name": name, f"optimizer.{key}": value},
             f"optimizer.{key}={value!r} does nothing with optimizer.name={name!r}, but with ")
            for name, key, value in (
                ("adamw", "momentum", 0.5), ("lion", "momentum", 0.5), ("lion", "eps", 1e-5),
                ("sgd", "b1", 0.5), ("sgd", "b2", 0.5), ("sgd", "eps", 1e-5),
                ("adafactor", "b1", 0.5), ("adafactor", "b2", 0.5), ("adafactor", "eps", 1e-5),
                ("adafactor", "momentum", 0.5), ("adafactor", "moment_dtype", "bfloat16"),
            )
        ),
        ({"layout.zero": 4}, "layout.zero=4 is not at least 0 and below 4"),
        ({"data.tokenizer": "t"}, "data.tokenizer='t' does nothing with a built-in corpus"),
        ({"data.split": "9,1"}, "data.split='9,1' does nothing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(plain, overrides, said):
    message = refused(plain, overrides)
    assert message.startswith("a setting cannot be used:\n")
    assert said in message


def test_only_the_settings_that_do_nothing_are_named(plain):
    message = refused(plain, {"optimizer.schedule": "constant", "optimizer.decay_steps": 9})
    assert "min_lr" not in message


@pytest.mark.parametrize(
    "overrides",
    [
        {"optimizer.schedule": "constant", "optimizer.warmup_steps": 5},
        {"optimizer.lr": 0},
        {"optimizer.name": "muon", "optimizer.b1": 0.5, "optimizer.b2": 0.5, "optimizer.eps": 1e-5,
         "optimizer.momentum": 0.5, "optimizer.moment_dtype": "bfloat16"},
        {"optimizer.name": "lion", "optimizer.b1": 0.5, "optimizer.b2": 0.5},
        {"optimizer.name": "sgd", "optimizer.momentum": 0.0},
        {"optimizer.schedule": "inverse_sqrt", "optimizer.min_lr": 1e-5},
        {"optimizer.schedule": "wsd", "optimizer.wsd_decay_steps": 5, "train.steps": 2},
        {"optimizer.weight_decay": 0, "optimizer.weight_decay_end": 0.1,
         "optimizer.weight_decay_schedule": "cosine"},
        {"model.tied": False, "optimizer.head_lr_scale": 2.0, "optimizer.embedding_lr_scale": 0.0},
        {"layout.zero": "1"},
        {"model.positions": "rotary", "model.rotary_base": 5e5},
        {"data.path": "p", "data.split": "1", "data.tokenizer": "t"},
        {
            "model.attention": "cudnn",
            "model.dtype": "bfloat16",
            "data.cross_document_attention": True,
        },
        {"train.steps": 1, "optimizer.warmup_steps": 50},  # a short trial of a long recipe
    ],
)  # fmt: skip
def test_what_fits_together_is_not_refused(plain, overrides):
    load_config(plain, overrides)


# Specs


def test_a_shipped_config_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("gpt2:355m").model.n_layers == 24
    assert load_config("gpt2").model.n_layers == load_config("gpt2:").model.n_layers == 12
    assert load_config("gpt2:355m").name == "gpt2:355m"


def test_a_file_is_found_by_its_path_and_gets_its_argument(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    path = Path(config_file(tmp_path / "sub", "cfg.name = arg\nreturn cfg"))
    for spec in (f"{path}:a:b", "sub/mine.py:a:b", "./sub/mine.py:a:b", "sub/../sub/mine.py:a:b"):
        assert load_config(spec).name == "a:b"
    assert load_config(str(path)).name == "none"
    assert load_config(path).name == "none"  # from Python, a Path
    monkeypatch.chdir(path.parent)
    assert load_config("mine.py:x").name == "x"
    assert load_config("mine.py:x", {"name": "y"}).name == "y"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gpt22", "no config 'gpt22'; did you mean gpt2? shipped: bert, chat, "),
        ("GPT2:124m", "did you mean gpt2?"),
        ("zzz", "no config 'zzz'; shipped: "),
        ("", "no config ''; shipped: "),
        ("gpt2.py", "no config 'gpt2.py'; did you mean gpt2?"),
        ("no/such.py:x", "no config 'no/such.py'"),
        (".", "no config '.'"),
        ("x" * 300, "no config 'xxx"),
        ("\0", "no config "),
        ("gpt2:125m", "KeyError: '125m'; it has 124m, 355m, 774m, 1.5b"),
        ("llama:8B", "it has tiny, 2-7b, 3-8b, 3.1-8b"),
        ("quickstart:tiny", "takes 0 positional arguments but 1 was given"),
    ],
)
def test_a_spec_that_names_nothing_is_refused(spec, said):
    assert said in refused(spec)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def get_config(:", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('broken')", "RuntimeError: broken"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def get_config(): raise KeyError('size')", "KeyError: 'size'"),
        ("x = 1", "has no attribute 'get_config'"),
        *(
            (f"def get_config(): return {nonsense}", "mlm_jax.config.defaults()")
            for nonsense in ("None", "5", "{'model': {}}")
        ),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config(): return ConfigDict({'model': {'n_layers': 2}})",
            "mlm_jax.config.defaults()",
        ),
        (
            "from ml_collections import FrozenConfigDict\nfrom mlm_jax.config import defaults\n"
            "def get_config(): return FrozenConfigDict(defaults())",
            "mlm_jax.config.defaults()",
        ),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config(): return ConfigDict({'model': 5, 'train': {}})",
            "mlm_jax.config.defaults()",
        ),
    ],
)
def test_a_file_that_gives_no_config_is_refused_by_name(tmp_path, source, said):
    (tmp_path / "mine.py").write_text(source)
    for overrides in ({}, {"train.steps": 5}):
        message = refused(str(tmp_path / "mine.py"), overrides)
        assert message.startswith(str(tmp_path / "mine.py"))
        assert said in message


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mine.py").write_bytes(b"\xff\xfe")
    assert "mine.py" in refused(str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("cfg.model.n_layer = 2", "n_layer is no setting; did you mean n_layers?"),
        ("cfg.modle.n_layers = 2", "modle is no setting; did you mean model?"),
        ("cfg.model.n_layers = 'three'", "n_layers"),
        ("cfg.model.n_kv_heads = 'three'", "n_kv_heads"),
    ],
)
def test_a_line_that_sets_what_cannot_be_set_is_named(tmp_path, line, said):
    spec = config_file(tmp_path, f"\n{line}\nreturn cfg")
    message = refused(spec)
    assert message.startswith(f"{spec}, line 5: ")
    assert said in message
    assert len(message) < 200 + len(spec)  # without a listing of all settings


def test_values_that_a_file_sets_are_checked_like_overrides(tmp_path):
    spec = config_file(tmp_path, """
        cfg.model.norm = "rms"
        cfg.train.steps = 0
        cfg.unlock()
        cfg.train.stepz = 1
        cfg.extra = {"x": 1}
        return cfg
    """)  # fmt: skip
    message = refused(spec, {"optimizer.lr": "x"})
    assert message.startswith("5 settings cannot be used:")
    for said in ("model.norm='rms'", "train.steps=0", "train.stepz is no", "extra is no", "lr='x'"):
        assert said in message


def test_a_file_may_set_what_is_not_set_by_default(tmp_path):
    run = load_config(config_file(tmp_path, """
        cfg.layout.rules = {"mlp": ("tp", "fsdp")}
        cfg.layout.weights = "up$=embed,mlp"
        cfg.layout.tp, cfg.layout.preset, cfg.data.path = 2, "tp_sp", "some/prefix"
        cfg.layout.sequence_parallel = True
        cfg.optimizer.lr = 1
        return cfg
    """))  # fmt: skip
    assert run.layout.rules == (("mlp", ("tp", "fsdp")),)
    assert run.layout.weights == (("up$", ("embed", "mlp")),)
    assert (run.layout.tp, run.layout.preset, run.data.path) == (2, "tp_sp", "some/prefix")
    assert run.optimizer.lr == 1.0


def test_defaults_are_locked_and_fresh():
    cfg = defaults()
    with pytest.raises(AttributeError):
        cfg.model.n_layer = 3
    cfg.model.n_layers = 99
    assert defaults().model.n_layers != 99


# There and back


@pytest.mark.parametrize("spec", specs())
def test_every_shipped_config_loads_and_comes_back_from_json(spec):
    run = load_config(spec, {"layout.rules": "mlp=tp,fsdp; heads=", "layout.tp": 2})
    assert from_dict(run.to_dict()) == run
    assert from_dict(json.loads(json.dumps(run.to_dict()))) == run
    assert run.to_dict().keys() == {*SECTIONS, "init_from", "name"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_command_that_a_config_begins_with_can_be_carried_out(path):
    command = re.search(r"^mlm-jax train .*", runpy.run_path(str(path))["__doc__"], re.MULTILINE)
    words = [word.partition("=")[::2] for word in shlex.split(command[0])[2:]]
    settings = {name.removeprefix("--config."): value for name, value in words if value}
    spec = shlex.split(command[0])[3]
    assert spec.partition(":")[0] == path.stem
    load_config(spec, settings)


@pytest.mark.parametrize("damaged", [{"model": 5}, {"model": None}, {"layout": "tp"}])
def test_what_is_no_table_of_settings_is_refused(damaged):
    with pytest.raises(ConfigError, match="settings"):
        from_dict(damaged)


def test_missing_keys_take_their_defaults_and_unknown_ones_are_refused():
    assert from_dict({"model": {"n_layers": 2}}).model.d_model == RunConfig().model.d_model
    with pytest.raises(ConfigError, match=r"model\.n_layer is no setting; did you mean"):
        from_dict({"model": {"n_layer": 2}})
