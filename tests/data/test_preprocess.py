import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from mlm_jax.data import preprocess
from mlm_jax.data.fast_tokenizer import FastTokenizer
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.preprocess import Counts, build, chunks
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN / "tokenizer")


@pytest.mark.parametrize("chunk", [1, 50_000, preprocess.CHUNK])
@pytest.mark.parametrize("name", ["prose_a", "prose_b"])
def test_equals_megatron(name, chunk, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "CHUNK", chunk)
    source = GOLDEN / f"{name}.jsonl"
    counts = build([source], tokenizer, tmp_path / name, append_eod=True)
    for kind in ("bin", "idx"):
        file = f"{name}_text_document.{kind}"
        assert (tmp_path / file).read_bytes() == (GOLDEN / file).read_bytes()
    texts = [json.loads(line)["text"] for line in source.open()]
    tokens = (GOLDEN / f"{name}_text_document.bin").stat().st_size // 2
    assert counts == Counts(len(texts), tokens, sum(len(text.encode()) for text in texts))


def test_inputs_follow_each_other(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes("one é\r\n\ndocument".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"body": "x"}\r\n\n{"n": 1, "body": ""}'.encode())
    inputs = [tmp_path / "a.txt", str(tmp_path / "b.jsonl")]
    counts = build(inputs, tokenizer, tmp_path / "new" / "out", json_key="body")
    indexed = IndexedDataset(tmp_path / "new" / "out_body_document")
    assert tokenizer.decode(indexed.tokens(0)) == "one é\r\n\ndocument"
    assert tokenizer.decode(indexed.tokens(1)) == "x"
    assert indexed.documents.tolist() == [0, 1, 2, 2]
    assert counts == Counts(3, indexed.n_tokens, 18)
    assert indexed.dtype == np.uint16


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    vocab = {"a": 0, "b": 65_499}
    large = FastTokenizer(tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a")))
    (tmp_path / "a.txt").write_text("b")
    build([tmp_path / "a.txt"], large, tmp_path / "out")
    indexed = IndexedDataset(tmp_path / "out_text_document")
    assert indexed.dtype == np.int32
    assert indexed.tokens(0).tolist() == [65_499]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', "not JSON"),
        (b"plain text", "not JSON .* one JSON object a line"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'["text"]', "a list, not an object with 'text'"),
        (b'{"body": "x", "n": 1}', r"no text under 'text'; there is body \(str\), n \(int\)"),
        (b'{"text": null}', r"no text under 'text'; there is text \(NoneType\)"),
        (b"{}", "no text under 'text'; there is nothing"),
        (b'{"text": "\\ud800"}', "not valid Unicode"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_malformed_line_is_named_and_nothing_is_written(line, problem, tokenizer, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError, match=rf"in\.jsonl, line 3: {problem}"):
        build([source], tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_files_that_cannot_be_read_are_named(tokenizer, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    for name, problem in (("none.txt", "No such file"), (".", "directory"), ("bad.txt", "UTF-8")):
        with pytest.raises(DataError, match=f"{name}.*{problem}"):
            build([tmp_path / name], tokenizer, tmp_path / "out")


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_existing_output_is_not_touched(kind, tokenizer, tmp_path):
    there = tmp_path / f"out_text_document.{kind}"
    there.write_text("precious")
    with pytest.raises(DataError, match=f"{there}: already exists"):
        build([GOLDEN / "prose_a.jsonl"], tokenizer, tmp_path / "out")
    assert there.read_text() == "precious"


def test_a_place_that_cannot_be_written_is_named(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/out_text_document\.bin: cannot be written"):
        build([GOLDEN / "prose_a.jsonl"], tokenizer, tmp_path / "file" / "out")


def test_no_documents_are_refused(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for inputs in ([], [tmp_path / "empty.jsonl"]):
        with pytest.raises(DataError, match="out_text_document: there are no documents"):
            build(inputs, tokenizer, tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 1


def test_append_eod_needs_one(tmp_path):
    without = FastTokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(DataError, match=r"append_eod needs .* <\|endoftext\|>"):
        build([GOLDEN / "prose_a.jsonl"], without, tmp_path / "out", append_eod=True)


def test_chunks():
    texts = ["aaaa", "", "bbb", "cc", "d"]
    assert list(chunks(texts, 6)) == [["aaaa", ""], ["bbb", "cc"], ["d"]]
    assert list(chunks([], 6)) == []
