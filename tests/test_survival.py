"""What a run survives: kills, damage, full disks, signals at any moment, steps that go wrong."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import mlm_jax.checkpoint.manager
from mlm_jax.__main__ import main
from mlm_jax.checkpoint.manifest import damage, write_manifest
from mlm_jax.checkpoint.workdir import locked
from mlm_jax.data.pipeline import Batches
from mlm_jax.errors import CheckpointError, MlmJaxError
from mlm_jax.evaluate import examination
from mlm_jax.evaluate.examination import Examination
from mlm_jax.inference.engine import generate
from mlm_jax.loop import Story, train
from mlm_jax.metrics import read_rows
from tests.test_loop import (
    TINY,
    assert_same_bits,
    calm,  # noqa: F401
    rows_of,
    state_at,
    tiny,
    wait_until,
)

# How long it took, and what says that a run was started again.
CLOCKS = {"memory_gib", "time", "step_time_s", "data_wait_s", "tokens_per_s", "tflops_per_device"}
STARTS = {"compiling", "compiled"}


def written(workdir: Path) -> list[dict]:
    """What a run wrote, less clocks and starts: the same however often it was interrupted."""
    return [
        {key: value for key, value in row.items() if key not in CLOCKS}
        for row in read_rows(workdir / "metrics.jsonl")
        if row.get("event") not in STARTS
    ]


# Kills

KILLED = TINY | {"train.steps": 30, "checkpoint.every": 2, "train.eval_every": 7}


def command(workdir: Path, **settings: object) -> list[str]:
    words = [f"--config.{key}={value}" for key, value in (KILLED | settings).items()]
    run = [sys.executable, "-m", "mlm_jax", "train", "--config", "quickstart", *words]
    return [*run, "--workdir", str(workdir)]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> dict[str, str]:
    """The environment of a start that takes 5 s: on one device, compiled programs may be cached."""
    cache = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PLATFORMS": "cpu"}
    cache["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    cache["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("programs"))
    cache |= dict.fromkeys(
        ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"),
        "0",
    )
    return os.environ | cache


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, one_device) -> Path:
    """The run of `command`, never killed."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(workdir), env=one_device, capture_output=True, check=True)
    return workdir


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_if_it_had_never_been(
    undisturbed, one_device, tmp_path, kills
):
    rng, during_a_save = random.Random(kills), 0
    for kill in range(kills):
        begun, start = time.time(), newest(tmp_path)
        process = subprocess.Popen(command(tmp_path), env=one_device, stderr=subprocess.DEVNULL)
        try:
            if kill % 3 == 0:
                wait_until(lambda begun=begun: saving_since(tmp_path, begun), each=0.001)
                time.sleep(rng.uniform(0, 0.02))
            else:
                step = start + rng.randint(1, 4)
                wait_until(lambda b=begun, n=step: n in steps_since(tmp_path, b), each=0.002)
                time.sleep(rng.uniform(0, 0.05))
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL  # it had not ended by itself
        assert max(steps_since(tmp_path, begun)) > start
        during_a_save += saving_since(tmp_path, begun)
    assert during_a_save
    subprocess.run(command(tmp_path), env=one_device, capture_output=True, check=True)
    assert written(tmp_path) == written(undisturbed)
    assert_same_bits(*(state_at(w, 30, tiny()) for w in (tmp_path, undisturbed)))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["28", "30"]


def newest(workdir: Path) -> int:
    """The newest complete checkpoint, which is whole; or 0. An older one may be half removed."""
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()]
    assert not steps or not damage(workdir / "checkpoints" / str(max(steps)))
    return max(steps, default=0)


def saving_since(workdir: Path, begun: float) -> bool:
    """Whether there is a save that was begun then or later, and is not complete."""
    saves = (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")
    return bool(steps_since(workdir, begun)) and any(saves)  # an older one is gone by now


def steps_since(workdir: Path, begun: float) -> list[int]:
    return [row["step"] for row in rows_of(workdir) if row["time"] > begun]


# Damage


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    calm,  # noqa: F811
    tmp_path,
    caplog,
):
    run = shutil.copytree(calm, tmp_path / "run")
    (data,) = (run / "checkpoints" / "20" / "state" / "d").iterdir()
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1  # Orbax alone would restore this, and train on
    data.write_bytes(content)
    with caplog.at_level("WARNING", logger="mlm_jax"):
        assert train(tiny(), run)[:2] == (False, 20)
    (event,) = [row for row in rows_of(run, "event") if row["event"] == "damaged checkpoint"]
    assert event["problem"].endswith(
        f"checkpoints/20 is damaged: {data.relative_to(run / 'checkpoints' / '20')}"
        " is not what was written"
    )
    assert event["problem"] in caplog.text
    assert "going on from step 10" in caplog.text
    rest = [row for row in written(run) if row.get("event") != "damaged checkpoint"]
    assert rest == written(calm)
    assert_same_bits(state_at(run, 20, tiny()), state_at(calm, 20, tiny()))


# The folder


def test_two_runs_in_one_workdir_are_refused(calm, tmp_path):  # noqa: F811
    run = shutil.copytree(calm, tmp_path / "run")
    with locked(run), pytest.raises(CheckpointError) as why:
        train(tiny(), run)
    assert f"in use by process {os.getpid()} on {socket.gethostname()};" in str(why.value)
    assert (run / "metrics.jsonl").read_bytes() == (calm / "metrics.jsonl").read_bytes()
    with locked(run):  # which is free again, though the file stays
        pass


def test_a_workdir_that_cannot_be_written_is_refused_before_anything_is_compiled(
    monkeypatch, capsys
):
    """/proc can be written by nobody; os.access says that root can write anywhere."""
    monkeypatch.setattr(Story, "compiled", None)
    words = [f"--config.{key}={value}" for key, value in TINY.items()]
    workdir = "/proc/mlm_jax_run"
    assert main(["train", "--config", "quickstart", *words, "--workdir", workdir]) == 2
    message = f"mlm-jax: {workdir} is no folder that can be written ("
    assert capsys.readouterr().err.startswith(message)


def test_metrics_that_cannot_be_written_end_the_run_with_one_message(tmp_path, monkeypatch):
    def compiled(story: Story, *_: object) -> None:
        story.rows._file = open("/dev/full", "a")  # noqa: SIM115
        story.rows.write("event", 0, event="compiled")

    monkeypatch.setattr(Story, "compiled", compiled)
    with pytest.raises(MlmJaxError) as why:
        train(tiny(), tmp_path)
    assert type(why.value) is MlmJaxError
    assert "No space left on device" in str(why.value)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_message_and_the_checkpoint_before_whole(
    one_device, tmp_path
):
    """A file system of 8 MB, which something else fills once the run has saved."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    words = " ".join(command(disk / "run", **{"train.steps": 300}))
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", f"""
            mount -t tmpfs -o size=8m none {disk} || exit 99
            (until [ -d {disk}/run/checkpoints/4 ]; do sleep 0.05; done
             head -c 16M /dev/zero > {disk}/ballast) 2> {out}/ballast.log &
            {words} 2> {out}/stderr; status=$?; wait
            cp -r {disk}/run {out}/run; exit $status"""],
        env=one_device, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"mounting is not permitted: {done.stderr}")
    said = (out / "stderr").read_text()
    assert done.returncode == 1, said
    *rest, message = said.splitlines()  # TensorStore's threads may print errors of their own
    assert message.startswith("mlm-jax: ")
    assert not any("mlm_jax/" in line or line.startswith("mlm-jax: ") for line in rest)
    assert "No space left on device" in message
    assert f"{disk}/run" in message
    step = newest(out / "run")
    assert step >= 2
    rows = read_rows(out / "run" / "metrics.jsonl")
    assert max(row["step"] for row in rows) >= step
    run = tiny(**{key.replace(".", "__"): value for key, value in KILLED.items()})
    assert train(run, out / "run")[:2] == (False, 30)  # with room again, it goes on


# Data


def test_data_may_move_but_not_change(tmp_path, monkeypatch):
    monkeypatch.setattr(Story, "compiled", lambda *_: None)  # all before is what counts here
    monkeypatch.setattr(Story, "batches", lambda *_: iter(()))
    golden = Path(__file__).parent / "golden" / "data"
    vocabulary = {"model__vocab_size": 50257, "data__split": "9,1,0"}
    for name, text in (("here", "prose_a"), ("there", "prose_a"), ("other", "prose_b")):
        for kind in ("bin", "idx"):
            shutil.copy(golden / f"{text}_text_document.{kind}", tmp_path / f"{name}.{kind}")
    for name in ("here", "there"):
        train(tiny(data__path=str(tmp_path / name), **vocabulary), tmp_path / "run")
    other = str(tmp_path / "other")
    with pytest.raises(CheckpointError) as why:
        train(tiny(data__path=other, **vocabulary), tmp_path / "run")
    assert f"data.path={other!r} holds other data: documents " in str(why.value)


# Signals


def stop_now(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def before(function, do, when=lambda *_, **__: True):
    """function, with `do` called before it, where `when` says so of its arguments."""

    def wrapped(*args, **kwargs):
        if when(*args, **kwargs):
            do()
        return function(*args, **kwargs)

    return wrapped


def in_evaluation(monkeypatch, *, step: int) -> None:
    """At the second of three batches of the evaluation at this step."""
    now = [0]

    def hold(this: Examination, params, at: int, last: bool, real=Examination.hold) -> bool:
        now[0] = at
        return real(this, params, at, last)

    monkeypatch.setattr(Examination, "hold", hold)
    second = lambda self, k, rows=None, once=False: once and (now[0], k) == (step, 1)  # noqa: E731
    monkeypatch.setattr(Batches, "batch", before(Batches.batch, stop_now, second))


def in_sample(monkeypatch, *, step: int) -> None:
    at_step = lambda *_, seed, **__: seed == step  # noqa: E731
    monkeypatch.setattr(examination, "generate", before(generate, stop_now, at_step))


def in_save(monkeypatch, *, step: int) -> None:
    """While the files are written, in Orbax's thread."""
    this = lambda folder: folder.name.startswith(f"{step}.")  # noqa: E731
    slow = before(write_manifest, partial(time.sleep, 0.5))
    monkeypatch.setattr(mlm_jax.checkpoint.manager, "write_manifest", before(slow, stop_now, this))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        (in_evaluation, 20),
        pytest.param(in_save, 10, marks=SLOW),
        pytest.param(in_evaluation, 10, marks=SLOW),
        pytest.param(in_sample, 10, marks=SLOW),
        pytest.param(in_sample, 20, marks=SLOW),
    ],
)
def test_a_signal_stops_soon_saves_and_costs_nothing(
    calm,  # noqa: F811
    tmp_path,
    monkeypatch,
    moment,
    step,
):
    moment(monkeypatch, step=step)
    stopped = train(tiny(), tmp_path)
    monkeypatch.undo()
    assert stopped.stopped
    assert stopped.saved == newest(tmp_path)
    if moment is in_save:  # meanwhile the run may have gone on
        assert step <= stopped.saved < 20
    else:
        assert stopped.saved == step
        there = [
            row["kind"] for row in read_rows(tmp_path / "metrics.jsonl") if row["step"] == step
        ]
        assert there == (["train"] if moment is in_evaluation else ["train", "eval", "event"])
    assert train(tiny(), tmp_path)[:2] == (False, 20)
    assert sorted(written(tmp_path), key=order) == sorted(written(calm), key=order)


def order(row: dict) -> tuple:
    return row["step"], row["kind"], row.get("event", "")


def test_a_second_signal_ends_the_process_even_while_it_is_inside_xla():
    """Python calls no handler there, and a large model compiles for minutes."""
    code = (
        "import jax\n"
        "from mlm_jax.stop import StopSignals\n"
        "endless = lambda x: jax.lax.while_loop(lambda x: x < 2, jax.numpy.cos, x)\n"
        "with StopSignals():\n"
        "    program = jax.jit(endless).lower(1.0).compile()\n"
        "    print('inside', flush=True)\n"
        "    program(1.0).block_until_ready()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "inside\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
    finally:
        process.kill()
