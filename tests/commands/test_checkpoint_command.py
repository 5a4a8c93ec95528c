"""mlm-jax checkpoint as a person meets it: words in; a status, and one message or a result, out."""

import logging
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import mlm_jax.checkpoint.compare
from mlm_jax.__main__ import main
from mlm_jax.checkpoint.compare import distance
from mlm_jax.checkpoint.manager import Checkpoints
from mlm_jax.checkpoint.workdir import write_run
from mlm_jax.config import CheckpointConfig, RunConfig
from mlm_jax.data.tokenizer import load_tokenizer


def state_of(step: int) -> dict:
    """What a step is saved as, small. Of b the first element alone changes with the step."""
    params = {
        "a": np.full((2, 3), 1.5, np.float32),
        "b": np.array([step, 3.0, 4.0], np.float32),
        "c": np.ones(4, jax.numpy.bfloat16),
    }
    return {"step": np.int32(step), "params": params, "opt_state": ({"mu": params["b"] * step},)}


def save(workdir: Path, states: dict[int, dict]) -> Path:
    with Checkpoints(workdir, CheckpointConfig(keep=9)) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, jax.tree.map(jax.numpy.asarray, state))
    return workdir


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder of runs: one with steps 2 and 4; other, whose step 4 has other weights."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("run", "other"):
        write_run(folder / name, RunConfig(), load_tokenizer("bytes"), {})
    save(folder / "run", {2: state_of(2), 4: state_of(4)})
    other = state_of(4)
    other["params"] |= {"a": np.ones((3, 2), np.float32), "d": np.ones(1, np.float32)}
    other["params"]["c"] = np.ones(4, np.float32)
    del other["params"]["b"]
    save(folder / "other", {4: other})
    return folder


@pytest.fixture
def here(written, tmp_path, monkeypatch) -> Path:
    """A folder to stand in, with the two runs."""
    monkeypatch.setattr(logging.getLogger("mlm_jax"), "level", logging.NOTSET)
    shutil.copytree(written, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run(words: str) -> int:
    return main(["checkpoint", *shlex.split(words)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "required: action"),
        ("lsit", "invalid choice: 'lsit'"),
        ("list", "required: --workdir"),
        ("verify --workdir run --step 3", "run/checkpoints has no step 3; it has [2, 4]"),
        ("verify --workdir empty", "empty/checkpoints holds no checkpoint; has the run reached"),
        ("list --workdir nowhere", "nowhere is no run: there is no nowhere/checkpoints"),
        ("diff run", "required: B"),
        ("diff run nowhere", "nowhere is no run: there is no nowhere/checkpoints"),
        ("diff run:x run", "'x' in run:x is no step; give WORKDIR:STEP"),
        ("diff run:3 run", "run/checkpoints has no step 3; it has [2, 4]"),
        ("diff run empty", "empty/checkpoints holds no checkpoint"),
        ("diff run bad", "bad/checkpoints/2 is damaged: state/_METADATA is missing"),
        ("diff run foreign", "foreign/checkpoints/2 cannot be read (FileNotFoundError"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_refused(here, capsys, words, said):
    (here / "empty" / "checkpoints").mkdir(parents=True)
    shutil.copytree("run/checkpoints/2", "bad/checkpoints/2")
    Path("bad/checkpoints/2/state/_METADATA").unlink()
    shutil.copytree("bad", "foreign")
    sums = Path("foreign/checkpoints/2/SHA256SUMS")
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if "_METADATA" not in line))
    assert run(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mlm-jax: ")
    assert said in err
    assert "Traceback" not in err


# list


def test_a_list_says_what_is_there_and_what_is_missing(here, capsys):
    folder = here / "run" / "checkpoints"
    for name in ("6", "8", "10", "8.damaged", "12.orbax-checkpoint-tmp"):
        shutil.copytree(folder / "4", folder / name)
    (folder / "6" / "SHA256SUMS").unlink()
    (folder / "8" / "state" / "_METADATA").unlink()
    (folder / "10" / "state" / "_METADATA").write_text("")  # which only reading would find
    (folder / "14").mkdir()
    assert run("list --workdir run") == 0
    header, *rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert header == ["step", "saved", "GiB", "state"]
    assert {row[0]: row[-1] for row in rows} == {
        "2": "complete",
        "4": "complete",
        "6": "SHA256SUMS is missing",
        "8": "state/_METADATA is missing",
        "10": "complete",
        "14": "it holds neither state nor SHA256SUMS, the newest",
        "8.damaged": "damaged, and set aside",
        "12.orbax-checkpoint-tmp": "being saved, or left by a save that was killed",
    }
    assert [row[0] for row in rows][:6] == ["2", "4", "6", "8", "10", "14"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", rows[0][1])
    assert 1e-6 < float(rows[0][2]) < 1e-4


# verify


def test_what_is_whole_is_said_to_be(here, capsys):
    assert run("verify --workdir run") == 0
    whole = "step 2: whole\nstep 4: whole\nconfig.json and tokenizer: whole\n"
    assert capsys.readouterr().out == whole


def test_every_damaged_file_is_named_and_the_status_is_1(here, capsys):
    folder = Path("run/checkpoints/4/state")
    flip(folder / "_METADATA", 30)
    (folder / "_sharding").unlink()
    assert run("verify --workdir run") == 1
    assert capsys.readouterr().out.splitlines() == [
        "step 2: whole",
        "step 4: damaged",
        "  state/_METADATA is not what was written",
        "  state/_sharding is missing",
        "config.json and tokenizer: whole",
    ]
    assert run("verify --workdir run --step 2") == 0
    assert capsys.readouterr().out.startswith("step 2: whole\nconfig.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer.json"])
def test_settings_and_tokenizer_are_verified_too(here, capsys, name):
    path = Path("run", name)
    changed = path.read_text().replace("1e-05", "1e-06", 1).replace('"b"', '"b "', 1)
    assert changed != path.read_text()
    path.write_text(changed)
    assert run("verify --workdir run") == 1
    out = capsys.readouterr().out
    assert "step 4: whole\nconfig.json and tokenizer: damaged\n" in out
    assert f"{name} is not what was written" in out


# diff


def test_two_steps_of_a_run_are_compared_weight_by_weight(here, capsys):
    assert run("diff run:2 run") == 0
    first, second, _, header, *rows, _, last = capsys.readouterr().out.splitlines()
    assert (first, second) == ("A: run/checkpoints/2", "B: run/checkpoints/4")
    assert header.split() == ["weight", "A", "B", "max", "|a-b|", "|a-b|/|a|"]
    assert [row.split() for row in rows] == [
        ["a", "float32[2,3]", "same", "equal"],
        ["b", "float32[3]", "same", "2", f"{2 / 29**0.5:.3g}"],
        ["c", "bfloat16[4]", "same", "equal"],
    ]
    assert last == "3 arrays: 2 equal bit for bit, 1 different (most in b: 2)"


def test_all_compares_the_state_of_the_optimizer_too(here, capsys):
    assert run("diff run:2 run:4 --all") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [
        "opt_state.0.mu",
        "float32[3]",
        "same",
        "12",
        "1.45",
    ] in rows  # from 4, 6, 8 to 16, 12, 16
    assert ["step", "int32[]", "same", "2", "1"] in rows
    assert [row[0] for row in rows[4:-2]] == ["opt_state.0.mu", "a", "b", "c", "step"]


def test_weights_of_another_shape_or_on_one_side_only_are_told(here, capsys):
    assert run("diff run other") == 0
    *_, a, b, c, d, _, last = capsys.readouterr().out.splitlines()
    assert a.split() == ["a", "float32[2,3]", "float32[3,2]"]
    assert b.split() == ["b", "float32[3]", "none"]
    assert c.split() == ["c", "bfloat16[4]", "float32[4]", "0", "0"]
    assert d.split() == ["d", "none", "float32[1]"]
    assert last == "4 arrays: 1 different, 1 of another shape, 1 only in A, 1 only in B"


def test_a_run_is_the_same_as_itself(here, capsys):
    assert run("diff run run --all") == 0
    assert capsys.readouterr().out.endswith("5 arrays: 5 equal bit for bit\n")


def test_layouts_do_not_matter(here, capsys):
    """Over all devices, whose first shards may be equal where the rest is not."""
    mesh = jax.make_mesh((8,), ("fsdp",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    w = np.arange(64, dtype=np.float32).reshape(16, 4)
    last = w.copy()
    last[-1, -1] = 0
    for name, value in (("whole", w), ("split", jax.device_put(w, split)), ("last", last)):
        save(here / name, {1: {"params": {"w": value}}})
    assert run("diff whole split") == 0
    assert capsys.readouterr().out.endswith("1 array: 1 equal bit for bit\n")
    assert run("diff last split") == 0
    assert capsys.readouterr().out.endswith("1 array: 1 different (most in w: 63)\n")


def test_distances_do_not_depend_on_the_pieces_and_tell_what_is_not_finite(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1000)).astype(np.float32)
    expected = np.abs(a.astype(float) - b).max(), np.linalg.norm(a.astype(float) - b)
    expected = expected[0], expected[1] / np.linalg.norm(a.astype(float))
    for piece in (2**22, 7):
        monkeypatch.setattr(mlm_jax.checkpoint.compare, "PIECE", piece)
        np.testing.assert_allclose(distance(a, b), expected, rtol=1e-12)
        assert distance(a, a) == (0, 0)
        assert distance(0 * a, b)[1] == np.inf
        nan = b.copy()
        nan[3] = np.nan
        assert np.isnan(distance(a, nan)).all()
    assert distance(np.zeros(0), np.zeros(0)) == (0, 0)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
