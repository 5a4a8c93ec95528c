"""Checksums of a checkpoint: no byte may change unnoticed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mlm_jax.checkpoint.manifest import damage, require_whole, write_manifest
from mlm_jax.errors import CheckpointError


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of four files; what is beside state/ is Orbax's own."""
    for n, name in enumerate(("_METADATA", "d/1f", "d/2e", "empty")):
        (tmp_path / "state" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "state" / name).write_bytes(bytes(range(100)) * (n % 3))
    write_manifest(tmp_path)
    (tmp_path / "_CHECKPOINT_METADATA").write_text("written after the checksums")
    return tmp_path


def test_a_checkpoint_as_it_was_written_is_whole(folder):
    assert damage(folder) == []
    require_whole(folder)


@pytest.mark.parametrize("at", [0, 57, -1])
def test_a_flipped_bit_is_damage(folder, at):
    content = bytearray((folder / "state" / "d" / "1f").read_bytes())
    content[at] ^= 16
    (folder / "state" / "d" / "1f").write_bytes(content)
    assert damage(folder) == ["state/d/1f is not what was written"]


def test_a_file_that_is_missing_shorter_or_new_is_damage(folder):
    (folder / "state" / "empty").unlink()
    (folder / "state" / "d" / "2e").write_bytes(b"")
    (folder / "state" / "d" / "3d").write_bytes(b"x")
    (folder / "state" / "d" / "1f").write_bytes(bytes(range(99)))
    problems = [
        "state/d/1f is not what was written", "state/d/2e is not what was written",
        "state/d/3d was not written with the rest", "state/empty is missing",
    ]  # fmt: skip
    assert damage(folder) == problems
    with pytest.raises(CheckpointError) as why:
        require_whole(folder)
    assert f"{folder} is damaged: {', '.join(problems[:3])} and 1 more;" in str(why.value)


@pytest.mark.parametrize("change", ["", "gone", "\xff\xfe", "half"])
def test_checksums_that_are_damaged_themselves_are_damage(folder, change):
    sums = folder / "SHA256SUMS"
    if change == "gone":
        sums.unlink()
    else:
        whole = sums.read_bytes()
        sums.write_bytes(whole[: len(whole) // 2] if change == "half" else change.encode("latin-1"))
    assert damage(folder)


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum")
def test_coreutils_read_the_checksums(folder):
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder, capture_output=True, check=False).returncode == 0
    (folder / "state" / "empty").write_text("x")
    done = subprocess.run(check, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "state/empty: FAILED" in done.stdout
