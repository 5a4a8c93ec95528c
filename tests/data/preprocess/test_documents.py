"""What comes out of files: every form, cut anywhere, and what is wrong in them by its place."""

import gzip
import io
import json
import os
import re
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_jax.data.preprocess.documents import read_documents
from mlm_jax.data.preprocess.inputs import expand, parts
from mlm_jax.data.text_files import ZstdFile
from mlm_jax.errors import DataError

LIMIT = 10_000
LINES = ["one", "", "zwei é", "three\nlines", "x" * 300]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in LINES).encode()


def read(*inputs, keys=("text",), part_bytes=None, limit=LIMIT, skip=False):
    """All texts, and what was refused."""
    texts, problems = [], []

    def refuse(problem: str) -> None:
        if not skip:
            raise DataError(problem)
        problems.append(problem)

    found = parts(expand(inputs), keys, limit, part_bytes, lambda: None)
    for piece in (piece for part in found for piece in part.pieces):
        documents = list(read_documents(piece, keys, limit, refuse))
        texts += [d.texts if len(keys) > 1 else d.texts[0] for d in documents]
        assert sum(d.text_bytes for d in documents) == sum(
            len(text.encode()) for d in documents for text in d.texts
        )
    return (texts, problems) if skip else texts


def write_parquet(file, columns, row_group_size=2):
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=row_group_size)


@pytest.mark.parametrize("part_bytes", [None, 1, 7, 50, 10**6])
def test_every_form_gives_the_same_documents(tmp_path, part_bytes):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSONL))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(JSONL))
    write_parquet(tmp_path / "a.parquet", {"n": list(range(5)), "text": LINES})
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert read(tmp_path / name, part_bytes=part_bytes) == LINES, name
    (tmp_path / "a.txt").write_bytes("\ufeffplain é\r\n\ntext".encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert read(tmp_path / "a.txt", tmp_path / "a.txt.gz") == ["plain é\r\n\ntext", "packed"]


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(
        st.sampled_from([b"", b"  ", b'{"text": "a"}', b'{"text": "%s"}' % (b"b" * 40)])
    ),
    ends=st.sampled_from([b"\n", b"\r\n"]),
    open_end=st.booleans(),
    part_bytes=st.integers(1, 60),
)
def test_wherever_a_file_is_cut_each_line_is_read_once(
    tmp_path_factory, lines, ends, open_end, part_bytes
):
    file = tmp_path_factory.mktemp("cut") / "a.jsonl"
    content = ends.join(lines) + (b"" if open_end else ends)
    file.write_bytes(content)
    whole = [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
    assert read(file, part_bytes=part_bytes) == whole


@pytest.mark.parametrize("part_bytes", [None, 1, 20, 1000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_has_its_number_wherever_the_file_is_cut(tmp_path, name, part_bytes):
    content = b"".join(b'{"text": "good"}\n\n' if n % 5 else b"bad\n" for n in range(40))
    bad = [n for n, line in enumerate(content.splitlines(), start=1) if line == b"bad"]
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(pack(content))
    texts, problems = read(tmp_path / name, part_bytes=part_bytes, skip=True)
    assert len(texts) == 32
    assert [int(p.split("line ")[1].split(":")[0]) for p in problems] == bad
    assert all(p.startswith(f"{tmp_path / name}, line ") for p in problems)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', "not JSON"),
        (
            b"plain text",
            "not JSON (Expecting value: line 1 column 1 (char 0)); a line has one JSON",
        ),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 9_000, "not JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'["text"]', "a list; a line has one JSON object"),
        (b'{"body": "x", "n": 1}', "it lacks a text under 'text'; there is body (str), n (int)"),
        (b'{"text": null}', "it lacks a text under 'text'; there is text (NoneType)"),
        (b'{"text": 7}', "it lacks a text under 'text'; there is text (int)"),
        (b"{}", "it lacks a text under 'text'; there is nothing"),
        (b'{"text": "\\ud800"}', "not valid Unicode"),
        (b'{"text": "' + b"x" * LIMIT + b'"}', "longer than max_document_bytes=10,000"),
        (b"x" * 3_000_000, "longer than max_document_bytes=10,000"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_a_malformed_line_is_named_or_passed_over(line, problem, name, tmp_path):
    content = b'{"text": "good"}\n\n' + line + b'\n{"text": "better"}\n'
    pack = gzip.compress if name.endswith("gz") else bytes
    (tmp_path / name).write_bytes(pack(content))
    with pytest.raises(DataError) as why:
        read(tmp_path / name)
    assert str(why.value).startswith(f"{tmp_path / name}, line 3: {problem}")
    texts, problems = read(tmp_path / name, skip=True)
    assert (texts, len(problems)) == (["good", "better"], 1)


def test_a_long_line_is_never_in_memory(tmp_path):
    import tracemalloc

    with (tmp_path / "a.jsonl").open("wb") as file:
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b'\n{"text": "next"}')
    tracemalloc.start()
    texts, problems = read(tmp_path / "a.jsonl", skip=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (texts, len(problems)) == (["next"], 1)
    assert peak < 8 << 20


def test_several_keys_are_read_together(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"b": "2", "a": "1"}\n{"a": "3"}\n')
    write_parquet(tmp_path / "a.parquet", {"a": ["1", None], "b": ["2", "4"]})
    texts, problems = read(tmp_path / "a.*", keys=("a", "b"), skip=True)
    assert texts == [("1", "2"), ("1", "2")]
    assert problems == [
        f"{tmp_path}/a.jsonl, line 2: it lacks a text under 'b'; there is a (str)",
        f"{tmp_path}/a.parquet, row 2: it lacks a text under 'a'; there is a (NoneType), b (str)",
    ]
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DataError, match=r"a\.txt: has one text, for json_keys=a b"):
        read(tmp_path / "a.txt", keys=("a", "b"))


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        (pyarrow.array([1, 2, 3]), "row 1: it lacks a text under 'text'; there is text (int)"),
        (
            pyarrow.array(["a", "b", None]),
            "row 3: it lacks a text under 'text'; there is text (NoneType)",
        ),
        (pyarrow.array(["a", "b", "x" * 10_001]), "row 3: longer than max_document_bytes=10,000"),
        (pyarrow.array([b"a", b"b", b"\xff"]).view(pyarrow.utf8()), "row 3: not UTF-8"),
    ],
    ids=["int", "null", "long", "bytes"],
)
def test_a_row_of_parquet_that_is_no_text_is_named(tmp_path, column, problem):
    write_parquet(tmp_path / "a.parquet", {"text": column})
    for part_bytes in (None, 1):
        with pytest.raises(DataError, match=rf"a\.parquet, {re.escape(problem)}"):
            read(tmp_path / "a.parquet", part_bytes=part_bytes)


def damaged(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def parquet_bytes() -> bytes:
    out = io.BytesIO()
    write_parquet(out, {"text": LINES})
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.gz", gzip.compress(JSONL * 100)[:-20]),
        ("crc.gz", damaged(gzip.compress(JSONL), -6)),
        ("plain.gz", JSONL),
        ("cut.zst", zstandard.compress(JSONL * 100)[:-3]),
        ("second.zst", zstandard.compress(JSONL) + zstandard.compress(JSONL)[:-3]),
        ("plain.zst", JSONL),
        ("cut.parquet", parquet_bytes()[:-20]),
        ("empty.parquet", b""),
        ("other.parquet", JSONL),
        ("pages.parquet", damaged(parquet_bytes(), 30)),
        ("column.parquet", None),
        ("x.parquet.gz", JSONL),
        ("bad.txt", b"\xff"),
        ("long.txt", b"x" * (LIMIT + 1)),
    ],
)
def test_a_damaged_file_is_named_and_never_passed_over(tmp_path, name, content):
    if content is None:
        write_parquet(tmp_path / name, {"body": ["a"]})
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read(tmp_path / name, skip=not name.endswith("txt"))


def test_frames_of_zstandard_follow_each_other_and_cost_no_memory():
    content = zstandard.compress(b"a" * 10_000_000) + zstandard.compress(b"bc")
    with ZstdFile(io.BytesIO(content), "x.zst") as file:
        assert io.BufferedReader(file).read() == b"a" * 10_000_000 + b"bc"


@pytest.mark.parametrize(("module", "name"), [("zstandard", "a.zst"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, name):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"{name}: needs {module}: pip install {module}"):
        read(tmp_path / name)


# Names


def test_patterns_are_expanded_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "[x].txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert expand(["?.txt", "[x].txt"]) == ["a.txt", "b.txt", "[x].txt"]
    assert expand(["**/*.txt"]) == ["[x].txt", "a.txt", "b.txt", "sub/c.txt"]
    with pytest.raises(DataError) as why:
        expand(["none*", "gone.txt", "sub", "-", "-", "a.txt"])
    assert str(why.value).splitlines() == [
        "none*: no file matches this pattern",
        "  gone.txt: cannot be read: No such file or directory",
        "  sub: cannot be read: Is a directory",
        "  -: standard input can be read once",
    ]


# Streams


@pytest.mark.parametrize("pieces", [1, 7, 10**6])
@pytest.mark.parametrize("part_bytes", [None, 1, 25, 10**6])
def test_a_stream_is_cut_by_its_content_not_by_when_it_comes(tmp_path, part_bytes, pieces):
    found, again = (
        list(parts([piped(tmp_path, each)], ("text",), LIMIT, part_bytes, lambda: None))
        for each in (pieces, 10)
    )
    stretches = [piece for part in found for piece in part.pieces]
    contents = [b"".join(piece.lines) for piece in stretches]
    assert b"".join(contents) == JSONL
    sizes = [len(content) + content.count(b"\n") for content in contents]
    assert all(size >= (part_bytes or 1) for size in sizes[:-1])
    assert all(content.endswith(b"\n") for content in contents)
    assert len(contents) == {None: 1, 1: 5, 25: 4, 10**6: 1}[part_bytes]
    lines = [content.count(b"\n") for content in contents]
    assert [piece.begin for piece in stretches] == [sum(lines[:n]) for n in range(len(lines))]
    assert [part.name for part in again] == [part.name for part in found]


def test_a_long_line_of_a_stream_is_cut_and_refused(tmp_path):
    (tmp_path / "in").write_bytes(b"x" * 3_000_000 + b"\n" + JSONL)
    os.mkfifo(tmp_path / "pipe")
    feed = lambda: (tmp_path / "pipe").write_bytes((tmp_path / "in").read_bytes())  # noqa: E731
    threading.Thread(target=feed, daemon=True).start()
    texts, problems = read(tmp_path / "pipe", skip=True)
    assert texts == LINES
    assert problems == [f"{tmp_path}/pipe, line 1: longer than max_document_bytes=10,000"]


def piped(folder: Path, pieces: int) -> str:
    """A pipe, always of the same name, through which JSONL comes in pieces of this many bytes."""
    (folder / "pipe").unlink(missing_ok=True)
    os.mkfifo(folder / "pipe")

    def feed() -> None:
        with (folder / "pipe").open("wb", 0) as out:
            for begin in range(0, len(JSONL), pieces):
                out.write(JSONL[begin : begin + pieces])

    threading.Thread(target=feed, daemon=True).start()
    return str(folder / "pipe")
