"""The loop: resuming exactly, stopping when asked, and what it writes down."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import mlm_jax.data.placement
import mlm_jax.loop
from mlm_jax.checkpoint.manager import Checkpoints
from mlm_jax.config import RunConfig
from mlm_jax.door import load_config
from mlm_jax.errors import CheckpointError, MlmJaxError
from mlm_jax.layout import Layout
from mlm_jax.loop import Story, train
from mlm_jax.metrics import read_rows
from mlm_jax.step import TrainState, make_steps

TINY = {
    "model.n_layers": 2, "model.d_model": 32, "model.seq_len": 64, "model.dropout": 0.1,
    "train.steps": 20, "train.global_batch_size": 8, "train.log_every": 1, "train.eval_every": 10,
    "train.eval_batches": 3, "optimizer.warmup_steps": 2, "checkpoint.every": 10,
    "layout.preset": "single",
}  # fmt: skip


def tiny(**overrides) -> RunConfig:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config("quickstart", TINY | dotted)


def rows_of(workdir: Path, kind: str = "train") -> list[dict]:
    return [row for row in read_rows(workdir / "metrics.jsonl") if row["kind"] == kind]


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows_of(workdir)}


def state_at(workdir: Path, step: int, run: RunConfig) -> TrainState:
    """The saved state, under run's layout."""
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(make_steps(run, Layout.from_config(run)).abstract, step)


def assert_same_bits(a: TrainState, b: TrainState) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    """20 steps without a disturbance."""
    workdir = tmp_path_factory.mktemp("calm")
    assert train(tiny(), workdir) == (False, 20, workdir / "report.html")
    return workdir


@pytest.mark.smoke
def test_a_run_learns_and_writes_what_it_promises(calm):
    rows = rows_of(calm)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    promised = {"loss", "grad_norm", "learning_rate", "tokens", "step_time_s", "data_wait_s"}
    promised |= {"tokens_per_s", "tflops_per_device", "mfu", "memory_gib"}
    assert promised <= rows[-1].keys()
    assert rows[-1]["tokens"] == 20 * 8 * 64
    assert 0.1 < rows[-1]["memory_gib"] < 64  # on a CPU, of the process
    evals = rows_of(calm, "eval")
    assert [row["step"] for row in evals] == [10, 20]
    assert evals[1]["eval_loss"] < evals[0]["eval_loss"]
    assert 1 < evals[1]["bits_per_byte"] < 8
    config = json.loads((calm / "config.json").read_text())
    assert config["format"] == 1
    assert config["model"]["d_mlp"] == 128
    assert (calm / "tokenizer" / "tokenizer.json").exists()
    assert list((calm / "tensorboard").iterdir())
    assert sorted(p.name for p in (calm / "checkpoints").iterdir()) == ["10", "20"]


@pytest.mark.slow
def test_another_layout_restores_the_same_bits_and_goes_on_alike(calm, tmp_path):
    first, second = tiny(train__steps=10, optimizer__decay_steps=20), tiny(layout__preset="fsdp_tp")
    train(first, tmp_path)
    on_eight = state_at(tmp_path, 10, second)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(on_eight.params)} == {8}
    assert_same_bits(state_at(tmp_path, 10, first), on_eight)
    train(second, tmp_path)
    after, expected = losses(tmp_path), losses(calm)
    for step in range(1, 21):
        np.testing.assert_allclose(after[step], expected[step], rtol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on_from_there(
    calm, tmp_path, monkeypatch, number
):
    at = partial(signal_at_step, number)
    monkeypatch.setattr(Story, "write_train_row", at(7, Story.write_train_row))
    assert train(tiny(), tmp_path)[:2] == (True, 7)
    monkeypatch.undo()
    assert train(tiny(), tmp_path)[:2] == (False, 20)
    assert losses(tmp_path) == losses(calm)


def test_a_signal_before_the_first_step_saves_nothing(tmp_path, monkeypatch):
    compiled = Story.compiled

    def compiled_while_asked_to_stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return compiled(*args)

    monkeypatch.setattr(Story, "compiled", compiled_while_asked_to_stop)
    assert train(tiny(), tmp_path)[:2] == (True, 0)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    code = (
        "import os, signal\n"
        "from mlm_jax.stop import StopSignals\n"
        "with StopSignals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")


def test_a_finished_run_is_left_as_it_is(calm):
    before = (calm / "metrics.jsonl").read_text()
    assert train(tiny(), calm)[:2] == (False, 20)
    assert (calm / "metrics.jsonl").read_text() == before


def test_a_finished_run_goes_on_when_given_more_steps(calm, tmp_path):
    train(tiny(train__steps=5, optimizer__decay_steps=20), tmp_path)
    train(tiny(optimizer__decay_steps=20), tmp_path)
    assert losses(tmp_path) == losses(calm)


def test_the_batches_do_not_depend_on_how_many_steps_were_asked_for(calm):
    short, long = (mlm_jax.loop.open_data(tiny(train__steps=n)).train for n in (20, 5000))
    for k in (0, 19):
        jax.tree.map(np.testing.assert_array_equal, short.batch(k), long.batch(k))


@pytest.mark.parametrize(
    "other",
    [{"model.n_layers": 3}, {"train.seed": 1}, {"train.global_batch_size": 16}],
    ids=str,
)
def test_a_workdir_of_another_run_is_refused(calm, other):
    before = {p: p.read_bytes() for p in calm.iterdir() if p.is_file()}
    (key, value), *_ = other.items()
    with pytest.raises(CheckpointError, match=f"{key} is .* there, {value} here"):
        train(load_config("quickstart", TINY | other), calm)
    assert {p: p.read_bytes() for p in calm.iterdir() if p.is_file()} == before


GROWS = {
    "train__batch_schedule": "0:4 1K:16", "train__global_batch_size": 16, "train__accumulate": 2,
    "train__steps": 8, "optimizer__decay_steps": 5, "train__eval_every": 100,
    "checkpoint__every": 100,
}  # fmt: skip


def test_a_batch_that_grows_is_counted_and_goes_on_after_a_restart(tmp_path):
    """Four steps of 4 sequences, then of 16 in two microbatches; stopped after the fifth."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny(**GROWS), whole)
    rows = rows_of(whole)
    assert [row["tokens"] for row in rows] == [64 * n for n in (4, 8, 12, 16, 32, 48, 64, 80)]
    compiled = [row for row in rows_of(whole, "event") if row["event"] == "compiled"]
    assert [(row["step"], row["batch_size"]) for row in compiled] == [(0, 4), (4, 16)]
    lr = tiny().optimizer.lr  # after a warm-up of two steps of 16
    rates = [row["learning_rate"] for row in rows[:5]]
    assert rates == pytest.approx([0, lr / 8, lr / 4, lr * 3 / 8, lr / 2])
    for steps in (5, 8):
        train(tiny(**GROWS | {"train__steps": steps}), parts)
    assert losses(parts) == losses(whole)
    with pytest.raises(CheckpointError, match=r"train\.batch_schedule is"):
        train(tiny(**GROWS | {"train__batch_schedule": "0:8 1K:16"}), parts)


@pytest.fixture
def poison(monkeypatch):
    """poison(3, 5): the losses of these steps are not finite."""

    def poison(*steps: int) -> None:
        calls, prepare = iter(range(1000)), mlm_jax.data.placement.place

        def place(batch, layout, size):  # the first call is the one that compiles
            bad = next(calls) in steps
            weights = batch["weights"] * (np.inf if bad else 1)
            return prepare(batch | {"weights": weights}, layout, size)

        monkeypatch.setattr(mlm_jax.data.placement, "place", place)

    return poison


def test_a_step_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint_before(
    calm, tmp_path, monkeypatch, poison
):
    poison(7)
    with pytest.raises(MlmJaxError) as why:
        train(tiny(train__log_every=10, checkpoint__every=3), tmp_path)
    assert type(why.value) is MlmJaxError  # exit status 1, not 2
    for said in (
        "step 7 was not applied, as loss or gradient is not finite",
        "loss nan, gradient norm nan, weights with such a gradient: all",
        "The newest checkpoint is of step 6",
        "open_data(run).train.batch(6)",
        "train.bad_steps_limit=10",
    ):
        assert said in str(why.value)
    (bad,) = [row for row in rows_of(tmp_path, "event") if row["event"] == "bad step"]
    assert (bad["step"], bad["loss"]) == (7, None)
    assert "blocks.mlp.up" in bad["weights"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]
    monkeypatch.undo()
    train(tiny(), tmp_path)
    assert losses(tmp_path)[20] == losses(calm)[20]


def test_steps_that_are_not_finite_are_left_out_written_down_and_limited(tmp_path, poison):
    poison(3, 5, 6, 7)
    with pytest.raises(MlmJaxError, match=r"3 steps in a row, to step 7.*optimizer\.lr"):
        train(tiny(train__bad_steps_limit=3, checkpoint__every=4), tmp_path)
    bad = [row["step"] for row in rows_of(tmp_path, "event") if row["event"] == "bad step"]
    assert bad == [3, 5, 6, 7]
    kept = state_at(tmp_path, 4, tiny())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))
    assert int(kept.opt_state[-1].count) == 3  # updates, not batches, drive the schedule


def signal_at_step(number: int, step: int, write_train_row):
    def write(story: Story, now: int) -> None:
        write_train_row(story, now)
        if now == step:
            os.kill(os.getpid(), number)

    return write


def wait_until(true, seconds: float = 120, each: float = 0.02) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if true():
                return
        except KeyError:
            pass
        time.sleep(each)
    raise TimeoutError
