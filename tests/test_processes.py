"""Several real processes train as one does, stop together, and end when one of them is lost."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mlm_jax.__main__ import main
from mlm_jax.checkpoint.manifest import damage
from mlm_jax.door import load_config
from mlm_jax.loop import train
from mlm_jax.metrics import read_rows

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).parent.parent
HOST = socket.gethostname()
TINY = {
    "model.n_layers": 2, "model.d_model": 32, "model.seq_len": 64, "model.dropout": 0.1,
    "train.steps": 8, "train.global_batch_size": 8, "train.log_every": 1, "train.eval_every": 4,
    "train.eval_batches": 2, "optimizer.warmup_steps": 2, "optimizer.decay_steps": 20,
    "checkpoint.every": 4,
}  # fmt: skip
ENDLESS = {"train.steps": 10**6, "train.eval_every": 10**6}
STEP = 4  # at which something happens


class Started:
    """launch/local.sh with so many processes; what they say is in a file."""

    def __init__(
        self, count: int, workdir: Path, fault: str = "none:0:0", devices: int = 2,
        **settings: object,
    ):  # fmt: skip
        words = [f"--config.{key}={value}" for key, value in (TINY | settings).items()]
        self.workdir, self.said = workdir, workdir.with_suffix(".said")
        with self.said.open("w") as out:
            self.shell = subprocess.Popen(
                ["bash", str(ROOT / "launch" / "local.sh"), str(count), "--", sys.executable,
                 "-m", "tests.faulty_process", fault, "train", "--config", "quickstart", *words,
                 "--workdir", str(workdir)],
                env=os.environ | {"DEVICES": str(devices), "PYTHON": sys.executable,
                                  "PYTHONPATH": str(ROOT),
                                  "XLA_FLAGS": "--xla_backend_optimization_level=0"},
                cwd=ROOT, stdout=out, stderr=out,
            )  # fmt: skip

    def pid(self, process: int) -> int:
        for entry in Path("/proc").iterdir():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                ours = int((entry / "stat").read_text().split()[3]) == self.shell.pid
            except (OSError, ValueError, IndexError):
                continue
            if ours and f"MLM_JAX_PROCESS={process}".encode() in variables:
                return int(entry.name)
        raise ProcessLookupError(process)

    def until(self, step: int, seconds: float = 120) -> "Started":
        end = time.monotonic() + seconds
        while step not in losses(self.workdir):
            assert self.shell.poll() is None, self.said.read_text()
            assert time.monotonic() < end, self.said.read_text()
            time.sleep(0.05)
        return self

    def ends(self, seconds: float) -> tuple[int, str]:
        """Exit status and all that was said."""
        return self.shell.wait(seconds), self.said.read_text()


@contextmanager
def started(*args, **kwargs) -> Iterator[Started]:
    run = Started(*args, **kwargs)
    try:
        yield run
    finally:
        for process in range(8):
            try:
                os.kill(run.pid(process), signal.SIGKILL)
            except ProcessLookupError:
                break
        run.shell.wait(60)


def losses(workdir: Path, kind: str = "train", key: str = "loss") -> dict[int, float]:
    rows = read_rows(workdir / "metrics.jsonl")
    return {row["step"]: row[key] for row in rows if row["kind"] == kind}


def assert_same_losses(workdir: Path, other: Path) -> None:
    """In training and evaluation, wherever `other` has them; only the order of sums differs."""
    for what in (("train", "loss"), ("train", "grad_norm"), ("eval", "eval_loss")):
        ours, theirs = losses(workdir, *what), losses(other, *what)
        assert ours.keys() >= theirs.keys()
        np.testing.assert_allclose([ours[k] for k in theirs], list(theirs.values()), rtol=2e-5)


def read(workdir: Path) -> list[dict]:
    starts = ("compiling", "compiled")
    return [r for r in read_rows(workdir / "metrics.jsonl") if r.get("event") not in starts]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Eight steps in this process, on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train(load_config("quickstart", TINY | {"layout.preset": "single"}), workdir)
    return workdir


@pytest.mark.smoke
def test_two_processes_train_as_one_does_and_one_goes_on_from_them_under_another_layout(
    alone, tmp_path
):
    sizes = {"train.steps": 4, "layout.fsdp": 2}
    with started(2, tmp_path / "run", "rows:0:0", **sizes) as run:
        status, said = run.ends(120)
    assert status == 0, said
    for process in range(2):  # its half of four steps and one to compile for, and of two batches
        assert f"process {process} read {5 * 4} and {2 * 4} rows" in said
    assert said.count("step 4/4") == said.count("Report: ") == 1  # only the lead says anything
    assert "Gloo" not in said
    assert sorted(p.name for p in (run.workdir / "checkpoints").iterdir()) == ["4"]
    assert not damage(run.workdir / "checkpoints" / "4")
    events = {row.get("event") for row in read(run.workdir) if row["step"] == 4}
    assert events >= {"sample", "baselines"}
    settings = TINY | {"layout.preset": "single"}
    assert train(load_config("quickstart", settings), run.workdir)[:2] == (False, 8)
    assert_same_losses(run.workdir, alone)


def test_the_others_end_within_seconds_of_a_kill_and_name_the_process(tmp_path):
    """The hardest one to lose, at which all meet."""
    with started(2, tmp_path / "run", **ENDLESS) as run:
        os.kill(run.until(STEP).pid(0), signal.SIGKILL)
        status, said = run.ends(15)
    assert status == 128 + signal.SIGKILL
    assert f"mlm-jax: process 0 of 2 on {HOST} was lost: its connection closed" in said
    assert "Traceback" not in said


def test_an_error_in_one_process_ends_all_and_is_shown_first(tmp_path):
    with started(2, tmp_path / "run", f"error:1:{STEP}", **ENDLESS) as run:
        status, said = run.until(STEP - 1).ends(15)
    assert status == 1
    said = re.split(r"^step .*\n", said, flags=re.MULTILINE)[-1].splitlines()
    assert said[0] == f"[process 1 of 2 on {HOST}] Traceback (most recent call last):"
    reason = f"ZeroDivisionError: the data of step {STEP} are bad"
    assert said[-2:] == [reason, f"mlm-jax: process 1 of 2 on {HOST} failed: {reason}"]


def test_processes_with_other_settings_are_refused_once(tmp_path):
    with started(2, tmp_path / "run", "seed:1:0") as run:
        status, said = run.ends(60)
    assert status == 2
    assert said.startswith("mlm-jax: all processes of a run need the same settings")
    assert said.endswith(f"\n  process 1 of 2 on {HOST}: train.seed is 7, not 0\n")
    assert said.count("mlm-jax: ") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"MLM_JAX_PROCESSES": "4", "MLM_JAX_PROCESS": "0"},
         "MLM_JAX_COORDINATOR='' is no host:port of process 0, such as node1:12345"),
        ({"MLM_JAX_PROCESSES": "4", "MLM_JAX_COORDINATOR": "n1:1"},
         "MLM_JAX_PROCESS='' is none of 0 to 3"),
        ({"MLM_JAX_PROCESS": "1"}, "MLM_JAX_PROCESSES='' is no number of processes"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS='x' is no number of processes"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE=4: JAX finds the processes of Slurm's srun"),
    ],
)  # fmt: skip
def test_a_process_that_cannot_find_the_others_is_refused_with_one_message(
    variables, told, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("mlm_jax.distributed.Joined.place", None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--config", "quickstart", "--workdir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mlm-jax: ")
    assert told in said
    assert not (tmp_path / "run").exists()


def shell(tmp_path: Path, count: int, command: str, gpus: int = 0, **environment: str):
    """launch/local.sh with a command of bash, on a machine with so many GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nfor i in $(seq {gpus}); do echo GPU $i: H100; done\n")
    tool.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG")}
    path = f"{tmp_path}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "local.sh"), str(count), "--", "bash", "-c", command],
        env=kept | {"PATH": path, "PYTHON": sys.executable} | environment,
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "environment", "told"),
    [
        (8, {}, ["0 0,1,2,3 ", "1 4,5,6,7 "]),
        (8, {"CUDA_VISIBLE_DEVICES": "3,7"}, ["0 0 ", "1 1 "]),
        (8, {"CUDA_VISIBLE_DEVICES": ""}, ["0  1", "1  1"]),
        (8, {"DEVICES": "6"}, ["0  3", "1  3"]),
        (0, {}, ["0  1", "1  1"]),
    ],
)
def test_processes_share_the_devices_of_a_machine(tmp_path, gpus, environment, told):
    command = 'echo "$MLM_JAX_PROCESS $JAX_LOCAL_DEVICE_IDS $JAX_NUM_CPU_DEVICES"'
    assert sorted(shell(tmp_path, 2, command, gpus, **environment).stdout.splitlines()) == told


@pytest.mark.parametrize(
    ("count", "gpus", "fit"), [(4, 2, "one of 1 2 processes"), (3, 8, "one of 1 2 4 8 processes")]
)
def test_gpus_that_cannot_be_shared_are_refused(tmp_path, count, gpus, fit):
    ended = shell(tmp_path, count, "echo no", gpus)
    assert (ended.returncode, ended.stdout) == (2, "")
    told = f"local.sh: {gpus} GPUs cannot be shared by {count} processes; try {fit}"
    assert ended.stderr.startswith(told)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("exit 75", 75),
        ("[ $MLM_JAX_PROCESS = 0 ] && exit 75; sleep 0.5; exit 3", 3),  # it failed all the same
        ("[ $MLM_JAX_PROCESS = 0 ] && exit 3; sleep 0.5; exit 75", 3),
        ("[ $MLM_JAX_PROCESS = 0 ] && exit 3; sleep 20", 3),  # which is asked to end
        ("trap 'exit 75' TERM; [ $MLM_JAX_PROCESS = 0 ] && { sleep 0.5; kill -HUP $PPID; };"
         " while :; do sleep 0.1; done", 75),
    ],
)  # fmt: skip
def test_the_status_of_all_is_that_of_a_failure_else_of_a_stop(tmp_path, command, status):
    begun = time.monotonic()
    ended = shell(tmp_path, 2, command)
    assert ended.returncode == status
    assert ended.stderr == ""
    assert time.monotonic() - begun < 8


# Slow: more processes, and more ways to end


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_write_ends_all_with_the_reason(tmp_path):
    """The others stand at Orbax's barriers, where they would wait for hours."""
    with started(2, tmp_path / "run", f"full:0:{STEP}", **ENDLESS) as run:
        status, said = run.until(STEP - 1).ends(20)
    assert status == 1
    told = f"mlm-jax: the checkpoint of step {STEP} could not be written to {run.workdir}"
    assert said.count(told) == 1, said
    assert "(No space left on device)" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_goes_on_in_two_and_then_in_one(alone, tmp_path):
    workdir = tmp_path / "run"
    for count, last, sizes in (
        (4, 4, {"layout.dp": 2, "layout.tp": 2}),
        (2, 6, {"layout.fsdp": 4}),
        (1, 8, {"layout.tp": 4, "layout.sequence_parallel": True}),
    ):
        with started(count, workdir, devices=4, **sizes | {"train.steps": last}) as run:
            status, said = run.ends(240)
        assert status == 0, said
    assert_same_losses(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["one", "all"])
def test_a_signal_to_one_or_all_stops_all_at_one_step_which_is_saved(alone, tmp_path, asked):
    settings = {"train.steps": 10**6, "checkpoint.every": 10**6, "train.eval_every": 10**6}
    with started(2, tmp_path / "run", **settings) as run:
        run.until(STEP)
        os.kill(run.pid(1) if asked == "one" else run.shell.pid, signal.SIGTERM)
        status, said = run.ends(60)
    assert status == 75, said
    (step,) = (int(p.name) for p in (run.workdir / "checkpoints").iterdir())
    assert f"stopped on request; saved at step {step}." in said
    assert max(losses(run.workdir)) == step
    with started(2, run.workdir, **settings | {"train.steps": step + 2}) as run:
        status, said = run.ends(120)
    assert status == 0, said
    assert f"resuming at step {step}" in said
    ours, theirs = losses(run.workdir), losses(alone)
    common = sorted(ours.keys() & theirs.keys())
    np.testing.assert_allclose([ours[k] for k in common], [theirs[k] for k in common], rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["save", "evaluate"])
def test_a_signal_in_a_save_or_an_evaluation_stops_all_there(alone, tmp_path, where):
    with started(2, tmp_path / "run", f"{where}:1:0", **{"train.steps": 10**6}) as run:
        status, said = run.ends(120)
    assert status == 75, said
    assert "stopped on request; saved at step 4." in said
    assert max(losses(run.workdir)) == 4
    assert bool(losses(run.workdir, "eval", "eval_loss")) == (where == "evaluate")
    assert "sample" not in {row.get("event") for row in read(run.workdir)}  # which comes later
    with started(2, run.workdir) as run:
        status, said = run.ends(120)
    assert status == 0, said
    assert_same_losses(run.workdir, alone)


@pytest.mark.slow
def test_a_program_trains_twice_in_the_same_processes(alone, tmp_path):
    with started(2, tmp_path / "run", "twice:0:4") as run:
        status, said = run.ends(120)
    assert status == 0, said
    assert_same_losses(run.workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 2])
def test_a_process_that_is_stopped_is_named_within_a_minute(tmp_path, process):
    with started(4, tmp_path / "run", devices=4, **ENDLESS) as run:
        pid = run.until(STEP).pid(process)
        os.kill(pid, signal.SIGSTOP)
        others = [run.pid(i) for i in range(4) if i != process]
        end = time.monotonic() + 60
        while any(alive(other) for other in others):
            assert time.monotonic() < end, run.said.read_text()
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        status, said = run.ends(15)
    assert status == 1
    assert f"process {process} of 4 on {HOST} was lost: it gave no sign of life for 50 s" in said


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_shows_where(tmp_path):
    settings = ENDLESS | {"train.hang_seconds": 5}
    with started(2, tmp_path / "run", f"hang:1:{STEP}", **settings) as run:
        status, said = run.until(STEP - 1).ends(20)
    assert status == 1
    assert f"process 1 of 2 on {HOST} hangs in data of step {STEP} for " in said
    assert "the others wait; train.hang_seconds=5 allows no more" in said
    assert f"[process 1 of 2 on {HOST}] It stands here:" in said
    assert "in read_slowly" in said


@pytest.mark.slow
def test_a_run_goes_on_after_a_kill_as_if_it_had_never_been(alone, tmp_path):
    with started(2, tmp_path / "run", **ENDLESS) as run:
        os.kill(run.until(6).pid(1), signal.SIGKILL)
        status, said = run.ends(15)
    assert status == 128 + signal.SIGKILL
    assert said.count(f"mlm-jax: process 1 of 2 on {HOST} was lost: its connection closed") == 1
    with started(2, run.workdir) as run:
        status, said = run.ends(120)
    assert status == 0, said
    assert re.search("resuming at step [48]", said)
    assert_same_losses(run.workdir, alone)


@pytest.mark.slow
def test_a_request_that_cannot_be_carried_out_is_told_once(tmp_path):
    for setting in ({"layout.tp": 3}, {"modle.x": 1}):
        with started(2, tmp_path / "run", **setting) as run:
            status, said = run.ends(60)
        assert status == 2
        assert said.count("mlm-jax: ") == 1, said
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.slow
def test_a_request_that_only_one_process_cannot_carry_out_is_told_by_that_one(tmp_path):
    with started(2, tmp_path / "run", "typo:1:0") as run:
        status, said = run.ends(60)
    assert status == 2
    assert said.startswith("[process 1 of 2] mlm-jax: a setting cannot be used"), said
    assert "modle.x" in said
