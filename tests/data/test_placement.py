"""Real processes, each with a part of eight devices, get the batches that one process gets."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mlm_jax.data.pipeline import open_data
from mlm_jax.data.placement import Feed, own_rows, place
from mlm_jax.door import load_config
from mlm_jax.layout import Layout

SETTINGS = {
    "model.seq_len": 16, "train.global_batch_size": 16, "train.accumulate": 2,
    "train.batch_schedule": "0:8 0.5K:16",
}  # fmt: skip
LAYOUTS = {
    "rows apart": {"layout.dp": 2, "layout.fsdp": 2, "layout.tp": 2},
    "rows shared": {"layout.dp": 2, "layout.tp": 4},  # a row's devices are in two of four processes
}


@pytest.mark.parametrize("sizes", [{"dp": 8}, {"dp": 2, "fsdp": 2, "tp": 2}, {"tp": 8}], ids=str)
def test_a_batch_is_split_over_the_data_axes(sizes):
    layout = Layout.create(**sizes)
    assert own_rows(layout, 16).tolist() == list(range(16))  # of the only process
    batch = {"tokens": np.arange(16 * 4).reshape(16, 4), "weights": np.ones((16, 4), np.float32)}
    placed = place(batch, layout, 16)
    for name, x in batch.items():
        assert placed[name].sharding == layout.sharding("batch", None)
        np.testing.assert_array_equal(placed[name], x)


def test_a_feed_gives_the_batches_of_every_size():
    run = load_config("quickstart", SETTINGS | LAYOUTS["rows apart"])
    train = open_data(run).train
    feed = Feed(train, Layout.from_config(run))
    for k, batch in enumerate(feed.ahead(2, 6), 2):
        jax.tree.map(np.testing.assert_array_equal, batch, train.batch(k))
        jax.tree.map(np.testing.assert_array_equal, batch, feed.batch(k))
    assert [train.sizes.size(k) for k in range(6)] == [8, 8, 8, 8, 16, 16]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_restart_under_another_process_count_goes_on_with_the_same_batches(layout, tmp_path):
    settings = SETTINGS | LAYOUTS[layout]
    train = open_data(load_config("quickstart", settings)).train
    spans = [(1, 0, 2), (2, 2, 4), (4, 4, 6), (4, 0, 2), (1, 2, 6)]  # processes, start, stop
    got: dict[tuple[int, int], set] = {}
    for processes, start, stop in spans:
        read = []
        for part in fed(tmp_path, processes, settings, start, stop):
            for k, row, tokens in part["rows"]:
                got.setdefault((k, row), set()).add(str(tokens))
            read.append(part["read"])
        if processes > 1 and layout == "rows apart":
            assert not set(read[0]) & set(read[1])  # each reads only what its devices hold
    assert all(len(seen) == 1 for seen in got.values())
    for k in range(6):
        tokens = train.batch(k)["tokens"].tolist()
        assert got.pop((k, "sum")) == {str(sum(map(sum, tokens)))}
        assert [got.pop((k, row)) for row in range(len(tokens))] == [{str(t)} for t in tokens]
    assert not got


def fed(folder: Path, processes: int, settings: dict, start: int, stop: int) -> list[dict]:
    """What each of so many processes got as batches start to stop."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"{processes}-{start}-{process}.json" for process in range(processes)]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.data.feeding_process", str(output), str(process),
             str(processes), str(port), json.dumps(settings), str(start), str(stop)],
            env=env | {"PYTHONPATH": os.pathsep.join(sys.path)}, stderr=subprocess.PIPE, text=True,
        )
        for process, output in enumerate(outputs)
    ]  # fmt: skip
    for process in running:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
    return [json.loads(output.read_text()) for output in outputs]
