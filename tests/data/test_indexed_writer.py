"""Whole documents at once, and pairs of files put together."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_jax.data import indexed_writer
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.indexed_writer import IndexedWriter, merge
from mlm_jax.data.preprocess.build import build
from mlm_jax.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
NAMES = ("prose_a", "prose_b")
Documents = st.lists(st.lists(st.lists(st.integers(0, 65_535), max_size=4), max_size=3), max_size=6)


def write(prefix, documents, dtype=np.uint16) -> IndexedDataset:
    with IndexedWriter(prefix, dtype) as writer:
        for sequences in documents:
            writer.add_document(sequences)
    return IndexedDataset(prefix)


def content(prefix) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@settings(max_examples=40, deadline=None)
@given(documents=Documents)
def test_many_documents_at_once_are_as_one_by_one(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("at_once")
    write(folder / "one", documents)
    with IndexedWriter(folder / "all", np.uint16) as writer:
        sequences = [np.array(s, np.int64) for document in documents for s in document]
        writer.add_documents(
            np.concatenate([np.empty(0, np.int64), *sequences]),
            [len(s) for s in sequences],
            [len(document) for document in documents],
        )
    assert content(folder / "one") == content(folder / "all")


@settings(max_examples=40, deadline=None)
@given(first=Documents, second=Documents)
def test_merged_is_as_written_together(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("merged")
    write(folder / "a", first)
    write(folder / "b", second)
    write(folder / "both", first + second)
    assert merge([folder / "a", folder / "b"], folder / "out") == np.uint16
    assert content(folder / "out") == content(folder / "both")


def test_merged_golden_files_are_as_built_together(tmp_path):
    merge([GOLDEN / f"{name}_text_document" for name in NAMES], tmp_path / "merged")
    files = [GOLDEN / f"{name}.jsonl" for name in NAMES]
    build(files, GOLDEN / "tokenizer", tmp_path / "built", append_eod=True)
    assert content(tmp_path / "merged") == content(tmp_path / "built_text_document")


def test_a_narrow_dtype_becomes_the_wide_one(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_writer, "BLOCK", 16)  # two tokens: several blocks
    write(tmp_path / "a", [[[1, 2, 65_535]], [[3, 4], [5]]])
    write(tmp_path / "b", [[[7, 70_000]]], np.int32)
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out") == np.int32
    merged = IndexedDataset(tmp_path / "out")
    assert [merged.tokens(i).tolist() for i in range(4)] == [
        [1, 2, 65_535], [3, 4], [5], [7, 70_000],
    ]  # fmt: skip
    assert merged.documents.tolist() == [0, 1, 3, 4]


def test_what_cannot_be_merged_leaves_nothing(tmp_path):
    write(tmp_path / "a", [[[1]]])
    with pytest.raises(DataError, match=r"a\.bin: already exists"):
        merge([tmp_path / "a"], tmp_path / "a")
    with pytest.raises(DataError, match=r"b\.idx: no such file"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_sequence_longer_than_the_format_counts_is_refused(tmp_path):
    with (
        pytest.raises(DataError, match=r"2,147,483,648 tokens; the format counts to"),
        IndexedWriter(tmp_path / "a", np.uint16) as writer,
    ):
        writer.add_documents(np.empty(0, np.uint16), [2**31], [1])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_message_and_nothing_is_left(tmp_path):
    write(tmp_path / "a", [[np.zeros(100_000, np.uint16)]] * 4)
    command = [sys.executable, "-m", "mlm_jax", "data", "merge", "--input", str(tmp_path / "a")]
    done = subprocess.run(
        [*command, str(tmp_path / "a"), "--output", str(tmp_path / "out")], check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == f"mlm-jax: {tmp_path}/out: cannot be written: File too large\n"
    assert len(list(tmp_path.iterdir())) == 2
