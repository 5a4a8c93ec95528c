import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlm_jax.data import index_cache
from mlm_jax.data.index_cache import DESCRIPTION, SMALLEST, cached
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.sampling import GptSamples
from mlm_jax.data.stream import Epochs, Weighted

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
KEY = {"index": "a test, 1", "seed": 7, "data": {"crc32": 5}}
LARGE = SMALLEST // 8
ARRAYS = {"a": np.arange(LARGE), "b": np.arange(12, dtype=np.int16).reshape(6, 2)}


@pytest.fixture
def kept(tmp_path):
    """The folder of an index after it was built once."""
    assert_equal(cached(tmp_path, KEY, lambda: ARRAYS))
    (folder,) = kept_in(tmp_path)  # and nothing temporary beside it
    return folder


@pytest.mark.smoke
def test_the_second_time_it_is_mapped(kept):
    found = cached(kept.parent, KEY, never)
    assert_equal(found)
    assert isinstance(found["a"].base, np.memmap)
    assert not found["a"].flags.writeable
    description = json.loads((kept / DESCRIPTION).read_text())
    assert description["key"] == KEY
    assert description["arrays"]["b"]["shape"] == [6, 2]


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"data": {"crc32": 6}}, {"index": "a test, 2"}, {"more": None}]
)
def test_another_key_is_another_index(change, kept):
    other = {"a": np.zeros(LARGE)}
    found = cached(kept.parent, KEY | change, lambda: other)
    assert found["a"].sum() == 0
    assert len(kept_in(kept.parent)) == 2
    assert_equal(cached(kept.parent, KEY, never))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / DESCRIPTION).unlink(),
        lambda folder: (folder / DESCRIPTION).write_text("{"),
        lambda folder: (folder / DESCRIPTION).write_text("[]"),
        lambda folder: (folder / DESCRIPTION).write_text('{"key": {}, "arrays": {}}'),
        lambda folder: (folder / "a.npy").unlink(),
        lambda folder: (folder / "a.npy").write_bytes(b""),
        lambda folder: (folder / "a.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{"),
        lambda folder: os.truncate(folder / "a.npy", 5000),
        lambda folder: os.truncate(folder / "a.npy", SMALLEST),
        lambda folder: np.save(folder / "a.npy", ARRAYS["a"][:-1]),
        lambda folder: np.save(folder / "a.npy", ARRAYS["a"].astype(np.int32)),
        lambda folder: np.save(folder / "a.npy", ARRAYS["a"] + (ARRAYS["a"] == 70_000)),
        lambda folder: np.save(folder / "b.npy", np.array([None])),
        lambda folder: [file.unlink() for file in folder.iterdir()],
    ],
    ids=range(14),
)
def test_damage_is_noticed_and_mended(damage, kept):
    damage(kept)
    calls = []
    assert_equal(cached(kept.parent, KEY, lambda: calls.append(1) or ARRAYS))
    assert calls == [1]
    assert_equal(cached(kept.parent, KEY, never))
    assert kept_in(kept.parent) == [kept]


def test_who_has_it_mapped_keeps_it_while_it_is_mended(kept):
    mapped = cached(kept.parent, KEY, never)
    (kept / DESCRIPTION).unlink()
    cached(kept.parent, KEY, lambda: ARRAYS)
    assert_equal(mapped)


def test_who_comes_second_leaves_a_whole_index_in_its_place(kept):
    """Or a third would find nothing while the two folders change places."""
    before = kept.stat().st_ino
    index_cache.save(kept, json.dumps(KEY), ARRAYS)
    assert kept_in(kept.parent) == [kept]
    assert kept.stat().st_ino == before
    assert_equal(cached(kept.parent, KEY, never))


def test_small_indices_are_not_kept(tmp_path):
    small = {"a": np.arange(LARGE - 1)}
    assert cached(tmp_path / "new", KEY, lambda: small)["a"] is small["a"]
    assert not kept_in(tmp_path / "new")
    assert cached(None, KEY, lambda: ARRAYS)["a"] is ARRAYS["a"]


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path, caplog):
    (tmp_path / "file").touch()  # where a folder is wanted: also root cannot write there
    with caplog.at_level(logging.WARNING):
        for seed in (1, 2):
            assert_equal(cached(tmp_path / "file", {"seed": seed}, lambda: ARRAYS))
    (record,) = caplog.records
    assert f"{tmp_path}/file cannot keep indices" in record.message


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_cache.np, "save", full)
    assert_equal(cached(tmp_path, KEY, lambda: ARRAYS))
    assert not kept_in(tmp_path)
    assert "No space left on device" in caplog.text


@pytest.mark.multiprocess
def test_many_processes_build_at_once(tmp_path):
    (tmp_path / "met").mkdir()
    processes = [start(BUILDS_OFTEN, tmp_path / "kept", tmp_path / "met") for _ in range(4)]
    for process in processes:
        _, messages = process.communicate(timeout=60)
        assert (process.returncode, messages) == (0, "")
    assert len(kept_in(tmp_path / "kept")) == 20  # one of each key, nothing temporary


@pytest.mark.multiprocess
def test_a_kill_leaves_nothing_under_the_final_name(tmp_path):
    process = start(SAVES_SLOWLY, tmp_path)
    assert process.stdout.readline() == "a is written\n"  # or "", after the 30 s it lives
    process.kill()
    process.communicate(timeout=60)
    assert list(tmp_path.rglob("a.npy"))
    assert [folder.name.startswith("partial-") for folder in kept_in(tmp_path)] == [True]
    assert_equal(cached(tmp_path, KEY, lambda: ARRAYS))
    assert_equal(cached(tmp_path, KEY, never))
    assert len(kept_in(tmp_path)) == 1  # what the killed one has left is removed


def test_samples_use_it(tmp_path, monkeypatch):
    monkeypatch.setattr(index_cache, "SMALLEST", 0)
    indexed = IndexedDataset(GOLDEN / "prose_a_text_document")
    size = dict(n_samples=300, seq_len=64, seed=1)
    for split, change in [
        (range(53), {}), (range(52), {}), (range(1, 53), {}), (range(53), {"seed": 2}),
        (range(53), {"seq_len": 65}), (range(53), {"n_samples": None}),
    ]:  # fmt: skip
        plain = GptSamples(indexed, split, **size | change)
        for _ in range(2):  # built, then found
            samples = GptSamples(indexed, split, **size | change, cache=tmp_path)
            for ours, theirs in zip(samples.index, plain.index, strict=True):
                assert isinstance(ours.base, np.memmap)
                np.testing.assert_array_equal(ours, theirs)
    assert len(kept_in(tmp_path)) == 6
    streams = [Epochs(lambda _: range(10))]
    blended, again = (Weighted(streams, [1.0], 200, tmp_path) for _ in range(2))
    assert len(kept_in(tmp_path)) == 7
    for ours, theirs in zip(again.index, blended.index, strict=True):
        assert isinstance(ours.base, np.memmap)
        np.testing.assert_array_equal(ours, theirs)


BUILDS_OFTEN = """
import os, pathlib, sys, time
import numpy as np
from mlm_jax.data.index_cache import SMALLEST, cached

kept, met = map(pathlib.Path, sys.argv[1:])
until = time.monotonic() + 30
for seed in range(20):
    (met / f"{seed}-{os.getpid()}").touch()
    while len(list(met.glob(f"{seed}-*"))) < 4:  # all begin a key together
        assert time.monotonic() < until, "the others did not come"
    array = np.full(SMALLEST // 8, seed)
    found = cached(kept, {"seed": seed}, lambda: {"a": array})
    np.testing.assert_array_equal(found["a"], array)
    assert isinstance(found["a"].base, np.memmap)
"""

SAVES_SLOWLY = """
import pathlib, sys, time
import numpy as np
from test_index_cache import ARRAYS, KEY, cached

def save(file, array, save=np.save):
    save(file, array)
    print(file.stem, "is written", flush=True)
    time.sleep(30)

np.save = save
cached(pathlib.Path(sys.argv[1]), KEY, lambda: ARRAYS)
"""


def start(script, *arguments):
    """A Python of its own, which imports what this file does."""
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kept_in(folder):
    return [path for path in folder.iterdir() if path.name != "lock"]


def never():
    raise AssertionError("it was built again")


def assert_equal(found):
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
