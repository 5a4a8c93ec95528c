"""Checkpoints: written beside the training, whole or refused, and never a mystery."""

import re
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlm_jax.checkpoint.manager
from mlm_jax.checkpoint.manager import Checkpoints, require_room
from mlm_jax.checkpoint.manifest import damage, write_manifest
from mlm_jax.config import CheckpointConfig
from mlm_jax.errors import CheckpointError, MlmJaxError

KEEP_2 = CheckpointConfig(keep=2)
MIB = 2**20


def state_of(seed: int, n: int = MIB) -> dict:
    """Two arrays, 4 n bytes and a few."""
    return {"params": {"w": jax.random.normal(jax.random.key(seed), (n,)), "b": jnp.arange(3.0)}}


@pytest.fixture
def saved(tmp_path) -> Path:
    """A workdir with the checkpoints 2 and 4."""
    with Checkpoints(tmp_path, KEEP_2) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state_of(step, 1000))
    return tmp_path


def test_training_goes_on_while_a_save_is_written_and_may_donate_the_state(tmp_path, monkeypatch):
    written, go_on = threading.Event(), threading.Event()

    def slow_disk(folder: Path) -> None:
        written.set()
        assert go_on.wait(60)
        write_manifest(folder)

    monkeypatch.setattr(mlm_jax.checkpoint.manager, "write_manifest", slow_disk)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = state_of(0, 16 * MIB)
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, KEEP_2) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
        assert written.wait(60)
        checkpoints.check()  # neither waits nor complains
        assert checkpoints.folder.joinpath("1.orbax-checkpoint-tmp").exists()
        go_on.set()
        checkpoints.wait()
        restored = checkpoints.restore(jax.eval_shape(lambda: state))
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert state["params"]["b"][0] == 5


@pytest.mark.parametrize("look", ["check", "save", "wait", "leave"])
def test_a_save_that_fails_in_the_background_is_told_at_the_next_look(saved, look):
    before = contents(saved)

    def fail_to_save_and_look() -> None:
        with Checkpoints(saved, KEEP_2) as checkpoints:
            with largest_file(MIB):
                checkpoints.save(6, state_of(6, 4 * MIB))
                while checkpoints._manager.is_saving_in_progress():
                    time.sleep(0.01)
            if look != "leave":
                getattr(checkpoints, look)(*[8, state_of(8)] * (look == "save"))
                pytest.fail("nothing was said")

    with pytest.raises(MlmJaxError) as why:
        fail_to_save_and_look()
    assert type(why.value) is MlmJaxError  # exit status 1, not 2
    said = str(why.value)
    assert f"step 6 could not be written to {saved}/checkpoints (File too large)" in said
    assert re.search(r"it takes 0\.0156 GiB, and [\d.e+]+ are free", said)
    assert contents(saved).items() >= before.items()
    with Checkpoints(saved, KEEP_2) as checkpoints:
        assert checkpoints.latest() == 4
        checkpoints.save(6, state_of(6))
    assert names(saved) == ["4", "6"]  # and nothing is left of the failed one


def test_what_went_wrong_first_is_what_is_told(saved):
    def fail_twice() -> None:
        with largest_file(MIB), Checkpoints(saved, KEEP_2) as checkpoints:
            checkpoints.save(6, state_of(6, 4 * MIB))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_twice()


def test_what_a_killed_save_left_is_removed_by_who_writes_and_seen_by_nobody(saved):
    leftover = saved / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(saved / "checkpoints" / "4", leftover)
    with Checkpoints(saved) as reader:
        assert reader.latest() == 4
    assert leftover.exists()
    with Checkpoints(saved, KEEP_2) as writer:
        assert writer.latest() == 4
    assert names(saved) == ["2", "4"]


def test_a_damaged_checkpoint_is_not_restored_and_the_file_is_named(saved):
    flip(saved / "checkpoints" / "4" / "state" / "manifest.ocdbt", 40)
    abstract = jax.eval_shape(lambda: state_of(0, 1000))
    with Checkpoints(saved) as reader:
        for restore, like in (
            (reader.restore, abstract),
            (reader.restore_params, abstract["params"]),
        ):
            with pytest.raises(CheckpointError) as why:
                restore(like)
            assert "checkpoints/4 is damaged: state/manifest.ocdbt is not what" in str(why.value)
            assert "remove that folder to go on from an older step" in str(why.value)
            restore(like, 2)


def test_a_writer_sets_damaged_checkpoints_aside_and_goes_on_from_the_newest_whole_one(saved):
    (saved / "checkpoints" / "4.damaged").mkdir()  # of an earlier time
    (saved / "checkpoints" / "4" / "state" / "_METADATA").unlink()
    with Checkpoints(saved, KEEP_2) as writer:
        assert writer.latest() == 2
        (problem,) = writer.damaged
        assert problem.endswith("checkpoints/4 is damaged: state/_METADATA is missing")
        writer.save(4, state_of(4, 1000))
    assert names(saved) == ["2", "4", "4.damaged"]
    assert (saved / "checkpoints" / "4.damaged" / "SHA256SUMS").exists()
    assert not damage(saved / "checkpoints" / "4")


def test_leftovers_of_several_processes_are_removed_too(saved):
    """Each writes a folder of its own, which the first merges at the end."""
    state = saved / "checkpoints" / "6.orbax-checkpoint-tmp" / "state"
    for process in range(4):
        shutil.copytree(
            saved / "checkpoints" / "4" / "state" / "ocdbt.process_0",
            state / f"ocdbt.process_{process}",
        )
    (state / "array_metadatas").mkdir()
    with Checkpoints(saved) as reader:
        assert reader.latest() == 4
    with Checkpoints(saved, KEEP_2) as writer:
        assert writer.latest() == 4
        writer.save(6, state_of(6, 1000))
    assert names(saved) == ["4", "6"]


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def without_state(step: Path) -> None:
    shutil.rmtree(step / "state")


def unsigned(step: Path) -> None:
    (step / "SHA256SUMS").unlink()


def signed_badly(step: Path) -> None:
    (step / "SHA256SUMS").write_text("")


def unreadable(step: Path) -> None:
    (step / "SHA256SUMS").unlink()
    (step / "SHA256SUMS").mkdir()


def broken_link(step: Path) -> None:
    shutil.rmtree(step / "state")
    (step / "state").symlink_to("nowhere")


WRONG = {
    empty: "is damaged: it holds neither state nor SHA256SUMS",
    without_state: r"is damaged: state/_METADATA is missing, .* and \d+ more",
    unsigned: "has no SHA256SUMS: another version of mlm_jax saved it, or that file is lost",
    signed_badly: "is damaged: SHA256SUMS is not what was written",
    unreadable: r"is damaged: SHA256SUMS cannot be read \(Is a directory\)",
    broken_link: "is damaged: state/_METADATA is missing",
}


@pytest.mark.parametrize("spoil", WRONG)
def test_a_newest_step_that_is_no_checkpoint_is_refused_by_name_and_the_one_before_used(
    saved, spoil
):
    spoil(saved / "checkpoints" / "4")
    abstract = jax.eval_shape(lambda: state_of(0, 1000))
    with Checkpoints(saved) as reader:
        with pytest.raises(CheckpointError, match=f"checkpoints/4 {WRONG[spoil]}") as why:
            reader.restore(abstract)
        assert ("if you trust it, (cd " in str(why.value)) == (spoil is unsigned)
    with Checkpoints(saved, KEEP_2) as writer:
        assert writer.latest() == 2
        assert re.search(WRONG[spoil], writer.damaged[0])
        jax.tree.map(np.testing.assert_array_equal, writer.restore(abstract), state_of(2, 1000))
    assert names(saved) == ["2", "4.damaged"]


def test_what_is_no_step_is_left_alone(saved):
    (saved / "checkpoints" / "7").write_text("a file")
    (saved / "checkpoints" / "8").symlink_to("nowhere")
    (saved / "checkpoints" / "06").mkdir()
    (saved / "checkpoints" / "notes").mkdir()
    before = names(saved)
    with Checkpoints(saved, KEEP_2) as writer:
        assert writer.latest() == 4
        assert writer.damaged == []
    assert names(saved) == before


def test_a_step_on_another_disk_may_be_a_link(saved, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "4"
    shutil.move(saved / "checkpoints" / "4", elsewhere)
    (saved / "checkpoints" / "4").symlink_to(elsewhere)
    with Checkpoints(saved, KEEP_2) as writer:
        restored = writer.restore(jax.eval_shape(lambda: state_of(0, 1000)))
    jax.tree.map(np.testing.assert_array_equal, restored, state_of(4, 1000))


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum")
def test_a_checkpoint_of_another_version_can_be_trusted_as_it_says(saved):
    unsigned(saved / "checkpoints" / "4")
    with Checkpoints(saved) as reader, pytest.raises(CheckpointError) as why:
        reader.restore(jax.eval_shape(lambda: state_of(0, 1000)))
    command = re.search(r"if you trust it, (\(.*\))", str(why.value))[1]
    subprocess.run(command, shell=True, check=True)
    assert not damage(saved / "checkpoints" / "4")


def test_a_run_does_not_begin_anew_because_all_its_checkpoints_are_damaged(saved):
    for step in "24":
        (saved / "checkpoints" / step / "SHA256SUMS").unlink()
    before = contents(saved)
    with pytest.raises(
        CheckpointError, match="checkpoints/4 has no SHA256SUMS: another version of mlm_jax"
    ):
        Checkpoints(saved, KEEP_2)
    assert contents(saved) == before


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused(tmp_path, monkeypatch):
    state = state_of(0, MIB)  # 4 MiB
    for free, hint in ((11 * MIB, "try checkpoint.keep=1, or a larger"), (MIB, "try a larger")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(free, 0, free))
        with pytest.raises(CheckpointError, match=hint) as why:
            require_room(tmp_path / "run", state, keep=2)
        assert "checkpoint.keep=2 takes 3 times 0.00391 GiB" in str(why.value)
    require_room(tmp_path / "run", state_of(0, MIB // 9), keep=1)
    assert not (tmp_path / "run").exists()


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def flip(path: Path, at: int) -> None:
    """One bit of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def names(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Writes beyond this fail, as on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
