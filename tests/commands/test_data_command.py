"""mlm-jax data as a person meets it: words in; a status, and one message or a result, out."""

import gzip
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from mlm_jax.__main__ import main
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.indexed_writer import IndexedWriter
from mlm_jax.data.preprocess import inputs
from mlm_jax.data.preprocess.encoding import write_documents
from mlm_jax.data.tokenizer import load_tokenizer

TOKENIZER = Path(__file__).parents[1] / "golden" / "data" / "tokenizer"
PROSE = TOKENIZER.parent / "prose_a.jsonl"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder to stand in, with inputs good and bad."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"This is document {n}. It ends.", "n": n}) for n in range(5)]
    Path("a.jsonl").write_text("\n".join(lines))
    Path("b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    Path("cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n' * 100)[:-9])
    Path("bad.jsonl").write_text('{"text": "good"}\nbad\n{"text": "' + "x" * 100 + '"}\n')
    Path("empty.jsonl").write_text("")
    Path("rows.parquet").write_text("PAR1")
    return tmp_path


def run(words: str) -> int:
    return main(["data", *shlex.split(words.replace("TOKENIZER", str(TOKENIZER)))])


BUILD = "build --tokenizer TOKENIZER --output out"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"{BUILD} --input 'none*.jsonl'", "none*.jsonl: no file matches this pattern"),
        (f"{BUILD} --input gone.jsonl a.jsonl", "gone.jsonl: cannot be read: No such file"),
        (f"{BUILD} --input ''", "cannot be read: No such file"),
        (f"{BUILD} --input bad.jsonl", "bad.jsonl, line 2: not JSON"),
        (f"{BUILD} --input cut.jsonl.gz", "cut.jsonl.gz: cannot be read: Compressed file ended"),
        (
            f"{BUILD} --input cut.jsonl.gz --on_error skip",
            "cut.jsonl.gz: cannot be read: Compressed file ended",
        ),
        (f"{BUILD} --input rows.parquet", "rows.parquet: damaged, or no parquet"),
        (f"{BUILD} --input empty.jsonl", "there are no documents to write"),
        (f"{BUILD} --input a.jsonl --json_keys body", "lacks a text under 'body'; there is text"),
        (f"{BUILD} --input a.jsonl --json_keys text n", "lacks a text under 'n'; there is text (s"),
        (f"{BUILD} --input a.jsonl --max_document_bytes 9", "line 1: longer than max_document_b"),
        (f"{BUILD} --input a.jsonl --workers 0", "workers=0: give 1 or more"),
        (f"{BUILD} --input a.jsonl --workers two", "invalid int value: 'two'"),
        (f"{BUILD} --input a.jsonl --on_error go", "invalid choice: 'go'"),
        ("merge --input x y --output out", "x.idx: no such file"),
        ("merge --output out", "required: --input"),
        ("inspect out", "out.idx: no such file"),
        ("train-tokenizer --input a.jsonl --vocab_size 99 --output t", "vocab_size=99 is less"),
        ("train-tokenizer --input bad.jsonl --vocab_size 300 --output t", "line 2: not JSON"),
        ("train-tokenizer --input a.jsonl --vocab_size 300 --output .", ".: already exists"),
        ("built --input a.jsonl", "invalid choice: 'built'"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_changes_nothing(here, words, said, capsys):
    before = sorted(path.name for path in here.iterdir())
    assert run(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mlm-jax: ")
    assert err.count("mlm-jax: ") == 1
    assert said in err
    assert sorted(path.name for path in here.iterdir()) == before


def test_one_bad_file_keeps_what_is_finished_of_the_others_but_no_output(
    here, capsys, caplog, monkeypatch
):
    monkeypatch.setattr(inputs, "LEAST", 1000)  # or both were one part
    assert run(f"{BUILD} --input a.jsonl bad.jsonl --workers 1") == 2
    assert capsys.readouterr().err.startswith("mlm-jax: bad.jsonl, line 2: not JSON")
    assert "out.building keeps 1 finished part(s)" in caplog.text
    assert not list(here.glob("out_*"))
    assert run(f"{BUILD} --input a.jsonl bad.jsonl --workers 1 --on_error skip") == 0
    assert not (here / "out.building").exists()


@pytest.mark.smoke
def test_files_are_built_inspected_and_merged(here, capsys, caplog):
    assert run(f"{BUILD} --input 'a*' 'b.*' --append_eod") == 0
    built = capsys.readouterr().out.splitlines()
    assert built[0].startswith("6 documents, ")
    assert built[1:] == ["--config.data.path=out_text_document"]
    assert run(f"{BUILD}2 --input a.jsonl bad.jsonl --on_error skip") == 0
    assert capsys.readouterr().out.startswith("7 documents, 1 skipped, ")
    assert "skipped: bad.jsonl, line 2: not JSON" in caplog.text
    assert run("merge --input out_text_document out2_text_document --output all") == 0
    assert capsys.readouterr().out.startswith("13 documents, ")
    assert run("inspect all --tokenizer TOKENIZER") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "13 documents, 13 sequences"
    assert lines[2].endswith("; the pair is whole")
    assert lines[-3:] == [f"[{n}] 'This is document {n}. It ends.<|endoftext|>'" for n in range(3)]


def test_sentences_are_built_and_inspected(here, capsys):
    assert run(f"{BUILD} --input a.jsonl --split_sentences") == 0
    assert capsys.readouterr().out.endswith("--config.data.path=out_text_sentence\n")
    assert run("inspect out_text_sentence --tokenizer TOKENIZER") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 documents, 10 sequences"
    assert lines[-1] == "[2] 'This is document 2.' 'It ends.'"


def test_inspect_draws_how_long_documents_are(here, capsys):
    with IndexedWriter("d", np.uint16) as writer:
        for length in [0, 1, 2, 3, 3, 4, 100]:
            writer.add_document([np.arange(length)] if length else [])
    assert run("inspect d") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "7 documents, 6 sequences"
    assert lines[1] == "113 tokens as uint16"
    assert lines[3] == "tokens a document: 0 least, 3 median, 16.1 mean, 100 most"
    rows = [line.split() for line in lines[4:]]
    assert [(int(row[0]), int(row[2]), int(row[3])) for row in rows] == [
        (0, 0, 1), (1, 1, 1), (2, 3, 3), (4, 7, 1),
        (8, 15, 0), (16, 31, 0), (32, 63, 0), (64, 127, 1),
    ]  # fmt: skip
    assert [len(row[4]) if len(row) > 4 else 0 for row in rows] == [14, 14, 40, 14, 0, 0, 0, 14]


def test_ids_beyond_the_vocabulary_are_named(here, capsys):
    with IndexedWriter("d", np.uint16) as writer:
        writer.add_document([[1, 2], [3, 9000, 8192]])
    assert run("inspect d --tokenizer TOKENIZER") == 2
    assert capsys.readouterr().err == (
        "mlm-jax: d.bin was not built with this tokenizer: 2 of 5 tokens are none of its ids, 0 to"
        " 8,191; the first is 9000 in sequence 1\n"
    )


def test_merging_tells_what_becomes_wider(here, capsys, caplog):
    for name, dtype in (("a", np.uint16), ("b", np.int32)):
        with IndexedWriter(name, dtype) as writer:
            writer.add_document([[1]])
    assert run("merge --input a b --output c") == 0
    assert capsys.readouterr().out.startswith("2 documents, 2 tokens as int32\n")
    assert caplog.messages == ["a: its uint16 tokens have become int32"]


def test_a_tokenizer_is_trained_on_all_of_the_input(here, capsys):
    assert run(f"train-tokenizer --input {PROSE} a.jsonl --vocab_size 600 --output whole") == 0
    assert capsys.readouterr().out == "600 ids; --tokenizer whole\n"
    assert run("train-tokenizer --input a.jsonl --vocab_size 600 --output some") == 0
    whole, some = (load_tokenizer(here / name) for name in ("whole", "some"))
    assert not whole.same_as(some)
    write_documents(["def f(x):"], some, here / "d", append_eod=True)
    indexed = IndexedDataset(here / "d")
    assert some.decode(indexed.tokens(0)) == "def f(x):<|endoftext|>"
