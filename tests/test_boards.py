"""Boards: what TensorBoard reads back, and what Weights & Biases keeps offline."""

import builtins
import importlib.util
import json
import math
import struct

import pytest

from mlm_jax.boards import check_wandb, curves, open_wandb
from mlm_jax.door import from_dict
from mlm_jax.errors import ConfigError
from mlm_jax.metrics import MetricsLog

WATCHED = from_dict({"watch": {"wandb": "demo"}})


def read_board(workdir):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(workdir / "tensorboard"))
    board.Reload()
    tags = board.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}


def test_tensorboard_reads_train_and_eval_rows(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write("train", 1, loss=2.5, mfu=None, note="text")
        log.write("train", 2, loss=math.nan, mfu=0.5)
        log.write("eval", 2, eval_loss=2.25)
        log.write("event", 2, event="baselines", xz=1.9)
    assert read_board(tmp_path) == {
        "train/loss": [(1, 2.5)],
        "train/mfu": [(2, 0.5)],
        "eval/eval_loss": [(2, 2.25)],
    }


def test_a_killed_run_keeps_its_curves(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(200):
        log.write("train", step, loss=2.5)
    assert len(read_board(tmp_path)["train/loss"]) == 200  # not closed
    log.close()


def test_tensorboard_forgets_what_a_resume_undid(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (10, 20, 30):
            log.write("train", step, loss=float(step))
    with MetricsLog(tmp_path, resume_step=20) as log:
        log.write("train", 25, loss=0.5)
    assert read_board(tmp_path) == {"train/loss": [(10, 10.0), (20, 20.0), (25, 0.5)]}


def test_nested_numbers_are_curves_and_lists_are_not():
    row = {"kind": "train", "step": 3, "time": 1.5, "loss": 2.5, "mfu": None, "note": "text"}
    row |= {"grad_norms": {"blocks.mlp.up": 0.5, "time": 1.0}, "by_layer": {"x": {"y": [1.0, 2.0]}}}
    assert curves(row) == {
        "train/loss": 2.5,
        "train/grad_norms/blocks.mlp.up": 0.5,
        "train/grad_norms/time": 1.0,
    }


def test_a_board_that_is_not_installed_is_refused_by_name(monkeypatch):
    find_spec = importlib.util.find_spec
    hide = lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    check_wandb(from_dict({}))
    with pytest.raises(ConfigError, match=r"watch\.wandb='demo' needs .*pip install"):
        check_wandb(WATCHED)


def test_no_wandb_is_imported_unless_asked_for(tmp_path, monkeypatch):
    imported = builtins.__import__

    def refuse(name, *rest):
        assert name != "wandb"
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert open_wandb(from_dict({}), tmp_path) == []


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")


def kept(folder):
    """Rows of history in the files that `wandb sync` would send, by the id of the run.

    Such a file is a log of LevelDB: 7 bytes that say so, then records of 4 bytes of checksum, 2 of
    length, 1 of type (1: whole, as they all are below 32 KiB) and a serialised message.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    rows = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at = path.read_bytes(), 7
        while at < len(data):
            length, kind = struct.unpack_from("<HB", data, at + 4)
            assert kind == 1
            record = Record.FromString(data[at + 7 : at + 7 + length])
            at += 7 + length
            if record.HasField("history"):
                items = record.history.item
                values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                rows.setdefault(path.stem.removeprefix("run-"), []).append(values)
    return rows


def test_wandb_keeps_a_run_and_its_resumption_as_one(tmp_path, offline):
    for step in (10, 20):
        with MetricsLog(
            tmp_path, resume_step=step - 10, boards=open_wandb(WATCHED, tmp_path)
        ) as log:
            log.write("train", step, loss=step / 4, grad_norms={"norm.scale": 0.5}, mfu=None)
            log.write("eval", step, eval_loss=step / 5)
            log.write("event", step, event="baselines", xz=1.9)
    ((name, rows),) = kept(tmp_path).items()
    assert name == (tmp_path / "wandb" / "run-id").read_text()
    mine = [{k: v for k, v in row.items() if k[0] != "_"} for row in rows]
    assert mine == [
        {"step": 10, "train/loss": 2.5, "train/grad_norms/norm.scale": 0.5},
        {"step": 10, "eval/eval_loss": 2.0},
        {"step": 20, "train/loss": 5.0, "train/grad_norms/norm.scale": 0.5},
        {"step": 20, "eval/eval_loss": 4.0},
    ]


def test_wandb_without_an_account_is_refused(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the package wandb is not installed")

    def fail(**_):
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(ConfigError, match=r"watch\.wandb='demo': No API key.*WANDB_MODE=offline"):
        open_wandb(WATCHED, tmp_path)
