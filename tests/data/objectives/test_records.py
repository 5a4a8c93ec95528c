"""Files of conversations, pairs and preferences: every form, and every way to be wrong."""

import gzip
import json

import pytest

from mlm_jax.data.objectives.records import (
    MOST_PROBLEMS,
    read_conversations,
    read_pairs,
    read_preferences,
)
from mlm_jax.errors import DataError

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="x.jsonl"):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / name).write_text("\n".join(texts), encoding="utf-8", errors="surrogatepass")
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [SYSTEM, ASK, ANSWER]},
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        {"conversations": [SYSTEM, ASK, ANSWER]},
    ],
)
def test_forms_of_a_conversation(record, write):
    (got,) = read_conversations(write(record))
    assert got.messages == [SYSTEM, ASK, ANSWER]
    assert got.tools is None
    assert got.where.endswith("x.jsonl, line 1")


@pytest.mark.parametrize(
    ("given", "asked"),
    [(None, "do"), ("", "do"), ("it", "do\n\nit")],
)
def test_alpaca(given, asked, write):
    (got,) = read_conversations(write({"instruction": "do", "input": given, "output": "a"}))
    assert got.messages == [{"role": "user", "content": asked}, ANSWER]


def test_tools_and_their_calls_are_kept(write):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    answer = {"role": "tool", "content": "3", "name": "f"}
    (got,) = read_conversations(write({"messages": [ASK, call, answer], "tools": [{"name": "f"}]}))
    assert got.messages == [ASK, call, answer]
    assert got.tools == [{"name": "f"}]
    sharegpt = [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"},
        {"from": "observation", "value": "3"},
    ]  # fmt: skip
    (got,) = read_conversations(write({"conversations": sharegpt}))
    assert [m["role"] for m in got.messages] == ["user", "assistant", "tool"]


def test_compressed_with_blank_lines_and_a_byte_order_mark(tmp_path):
    line = json.dumps({"messages": [ASK, ANSWER]})
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(f"\ufeff{line}\r\n\n  \n{line}".encode()))
    assert [c.where[-6:] for c in read_conversations(tmp_path / "x.jsonl.gz")] == [
        "line 1", "line 4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", r"not JSON \(.*\); a line has one JSON object"),
        ('{"messages": NaN', "not JSON"),
        ("[1]", "a list; a line has one JSON object"),
        ({"text": "a"}, r"lacks 'messages', 'conversations' or 'instruction'; there is text \(str"),
        ({}, "there is nothing"),
        ({"messages": []}, "no list, or an empty one"),
        ({"messages": "hello"}, "no list, or an empty one"),
        ({"conversations": {"from": "gpt"}}, "no list, or an empty one"),
        ({"messages": [ASK]}, "no message is an assistant's"),
        ({"messages": ["a"]}, "message 1 is a str, not an object"),
        (
            {"messages": [ASK, {"role": "bot", "content": "a"}]},
            "message 2 has role 'bot'; there are",
        ),
        ({"messages": [ASK, {"content": "a"}]}, "message 2 has role None"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "message 1 has role 'robot'"),
        ({"messages": [{"role": "user"}, ANSWER]}, r"message 1 \(user\) has NoneType for content"),
        ({"messages": [ASK, {"role": "assistant", "content": ["a"]}]}, "has list for content"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, "with .* tool_calls null"),
        ({"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "not valid Unicode"),
        ({"messages": [ASK, ANSWER], "tools": "f"}, "its 'tools' are a str, not a list"),
        ({"instruction": "a"}, "lacks a text under 'output'; there is instruction"),
        ({"instruction": 1, "output": "a"}, "lacks a text under 'instruction'"),
        ({"instruction": "a", "input": 1, "output": "a"}, "lacks a text under 'input'"),
    ],
)
def test_a_bad_conversation_is_named_by_file_and_line(record, message, write):
    file = write({"messages": [ASK, ANSWER]}, record)
    with pytest.raises(DataError, match=f"^{file}, line 2: .*{message}"):
        read_conversations(file)


def test_the_first_problems_come_together(write):
    good, bad = {"messages": [ASK, ANSWER]}, {"messages": [ASK]}
    with pytest.raises(DataError) as error:
        read_conversations(write(bad, good, "{", bad))
    lines = str(error.value).split("\n")
    assert [line.split(": ")[0][-6:] for line in lines] == ["line 1", "line 3", "line 4"]
    with pytest.raises(DataError, match="has not been looked at") as error:
        read_conversations(write(*[bad] * 50))
    assert str(error.value).count("line ") == MOST_PROBLEMS


def test_files_that_cannot_be_read(write, tmp_path):
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(DataError, match=r"missing\.jsonl: cannot be read: .*No such file"):
        read_conversations(missing)
    with pytest.raises(DataError, match=r"x\.jsonl: there is nothing in it"):
        read_conversations(write("", " "))
    (tmp_path / "x.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match=r"x\.jsonl, line 1: not UTF-8"):
        read_conversations(tmp_path / "x.jsonl")
    whole = gzip.compress(json.dumps({"messages": [ASK, ANSWER]}).encode() * 100)
    damaged = whole[:12] + b"\xff\xff" + whole[14:]
    for content in (whole[:-20], b"plain text", damaged):
        (tmp_path / "x.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.jsonl\.gz: cannot be read: ."):
            read_conversations(tmp_path / "x.jsonl.gz")


def test_forms_of_a_pair(write):
    file = write(
        {"source": "a", "target": "b"},
        {"translation": {"en": "a", "fr": "b"}},
        {"translation": {"fr": "b", "de": "c", "en": "a"}},
    )
    assert [pair[1:] for pair in read_pairs(file)] == [("a", "b"), ("a", "b"), ("b", "c")]
    got = read_pairs(file, languages=("en", "fr"))
    assert [pair[1:] for pair in got] == [("a", "b")] * 3
    tsv = write("a\tb", "", "c d\te ", name="x.tsv")
    assert [pair[1:] for pair in read_pairs(tsv)] == [("a", "b"), ("c d", "e ")]
    assert read_pairs(tsv)[1].where.endswith("x.tsv, line 3")
    (tsv.parent / "x.tsv.gz").write_bytes(gzip.compress(b"a\tb\r\n"))
    assert read_pairs(tsv.parent / "x.tsv.gz")[0][1:] == ("a", "b")


@pytest.mark.parametrize(
    ("line", "name", "message"),
    [
        ({"source": "a"}, "x.jsonl", "lacks a text under 'target'; there is source"),
        ({"translation": {"en": "a", "fr": 1}}, "x.jsonl", "lacks a text under 'fr'"),
        ({"translation": {"en": "a"}}, "x.jsonl", "no object with two languages"),
        ({"translation": "a"}, "x.jsonl", "no object with two languages"),
        ("a", "x.tsv", "1 columns between tabs instead of 2"),
        ("a\tb\tc", "x.tsv", "3 columns between tabs"),
    ],
)
def test_a_bad_pair_is_named(line, name, message, write):
    with pytest.raises(DataError, match=f"{name}, line 1: .*{message}"):
        read_pairs(write(line, name=name))


def test_languages_that_are_not_there_are_named(write):
    file = write({"translation": {"en": "a", "fr": "b"}})
    with pytest.raises(DataError, match=r"lacks a text under 'de'; there is en \(str\), fr"):
        read_pairs(file, languages=("en", "de"))


OTHER = {"role": "assistant", "content": "other"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
        {"prompt": "q", "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
    ],
)
def test_forms_of_a_preference(record, write):
    (got,) = read_preferences(write(record))
    assert (got.prompt, got.chosen, got.rejected) == ([ASK], [ANSWER], [OTHER])


def test_a_preference_of_texts(write):
    (got,) = read_preferences(write({"prompt": "p", "chosen": "c", "rejected": "r"}))
    assert got[1:] == ("p", "c", "r", None)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, "lacks a text under 'rejected'"),
        ({"chosen": "c", "rejected": "r"}, "lacks a text under 'prompt'"),
        ({"prompt": "p", "chosen": [ANSWER], "rejected": "r"}, "lacks a text under 'chosen'"),
        ({"prompt": [], "chosen": [ANSWER], "rejected": [OTHER]}, "no list, or an empty one"),
        ({"chosen": [ANSWER], "rejected": [OTHER]}, "there is no prompt"),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]}, "no message of 'chosen' is"),
        ({"prompt": [ASK], "chosen": [ANSWER], "rejected": [ASK]}, "no message of 'rejected' is"),
    ],
)
def test_a_bad_preference_is_named(record, message, write):
    with pytest.raises(DataError, match=f"line 1: .*{message}"):
        read_preferences(write(record))
