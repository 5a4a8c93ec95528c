import ast
import json
import re

import jinja2
import pytest

from mlm_jax.data.builtin import builtin_corpus
from mlm_jax.data.corpora import sources
from mlm_jax.data.corpora.conversations import (
    conversation,
    example,
    harvest,
    sentence,
    signature,
    subject,
)
from mlm_jax.data.corpora.docstrings import Docstring, docstrings
from mlm_jax.data.corpora.sources import Package, is_held_out
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.errors import DataError

MODULE = '''
def wrap(text, width=70, *, _fast=True):
    """Split the ``text`` into lines

    No line is longer than the width that was asked for.

    Args:
      text: This describes an argument and nothing else.

    >>> from text import wrap
    >>> wrap("a b", 1)
    ['a', 'b']
    """

class Wrapper:
    """A tool that wraps."""
    def run(self, text): "Wraps a text and returns it."
    @property
    def lines(self): "The lines of the last text."

def odd():
    """not a sentence"""

def _hidden():
    """Return what is hidden here."""

def again():
    """The lines of the last text!"""
'''


@pytest.fixture
def package(tmp_path):
    """A package with MODULE twice: in a public and in a private module."""
    for file in ("pkg/text.py", "pkg/sub/_text.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(MODULE)
    return Package("pkg", "1.0", "MIT", tmp_path / "pkg")


@pytest.fixture
def subjects(package):
    return {s.full: s for d in docstrings(package) if (s := subject(d))}


def test_what_is_told(subjects):
    names = ("wrap", "Wrapper", "Wrapper.run", "Wrapper.lines", "again")
    assert {*subjects} == {f"{home}'s `{n}`" for home in ("pkg.text", "pkg.sub") for n in names}
    assert subjects["pkg.text's `wrap`"].answers == {
        "name": "That is `wrap`.",
        "summary": "Split the `text` into lines.",
        "more": "No line is longer than the width that was asked for.",
        "signature": "`wrap(text, width=70, *, _fast=True)`",
        "example": "```python\n>>> from text import wrap\n>>> wrap(\"a b\", 1)\n['a', 'b']\n```",
    }


def test_pythons_private_modules_are_passed_over(package):
    found = [subject(d) for d in docstrings(package._replace(name="Python"))]
    assert {s.home for s in found if s} == {"text", "sub"}
    found = [subject(d) for d in docstrings(Package("Python", "3", "", package.folder / "sub"))]
    assert not any(found)


@pytest.mark.smoke
def test_conversations_have_their_form(subjects):
    for s in subjects.values():
        messages = conversation(s)
        assert messages == conversation(s)
        roles = [message["role"] for message in messages]
        spoken = roles[roles[0] == "system" :]
        assert spoken == ["user", "assistant"] * (len(spoken) // 2)
        assert 1 <= len(spoken) // 2 <= 4
        first = messages[roles.index("user")]["content"]
        assert s.full in first or s.answers["summary"] in first
        assert {m["content"] for m in messages if m["role"] == "assistant"} <= {*s.answers.values()}


def test_nothing_is_asked_twice(package):
    found = harvest([package])
    # `lines` and `again` have the same summary, and so has all in the other module.
    assert sorted(e.source for e in found) == ["Wrapper", "lines", "run", "wrap"]


@pytest.mark.parametrize(
    ("block", "read"),
    [
        ("Return the sum", "Return the sum."),
        ("Return the\nsum", ""),
        ("Return the ``sum``.", "Return the `sum`."),
        ("A list:\n  of things.", ""),
        ("sum(a, b) -> int", ""),
        ("Two words.", ""),
        ("Return " + "very " * 60 + "much.", ""),
    ],
)
def test_sentences_that_stand_alone(block, read):
    assert sentence(block) == read


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def f(a, /, b=(), *c, d: int, **e): 0", "`f(a, /, b=(), *c, d: int, **e)`"),
        ("def f(self, a): 0", "`f(a)`"),
        ("@classmethod\ndef f(cls): 0", "`f()`"),
        ("def f(selfless): 0", "`f(selfless)`"),
        ("@property\ndef f(self): 0", ""),
        ("class f: 0", ""),
        (f"def f(a='{'long' * 30}'): 0", ""),
    ],
)
def test_signatures(source, told):
    assert signature(Docstring("f.py", "f", "f", ast.parse(source).body[0], "")) == told


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (">>> a = 1\n>>> f(a)\n2", True),
        ("First.\n\n>>> for a in b:\n...     f(a)\n2\n3\n", True),
        (">>> g(1)\n2\n", False),
        (">>> f(1)\n", False),
        (">>> f(1)\nTraceback (most recent call last):\nX\n", False),
        (">>> f(1)  # doctest: +SKIP\n2\n", False),
        (f">>> f(1)\n{'2' * 400}\n", False),
    ],
)
def test_examples(text, shown):
    code = text[text.index(">>>") :].strip()
    told = f"```python\n{code}\n```" if shown else ""
    assert example(Docstring("f.py", "f", "A.f", ast.Module(), text)) == told


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A corpus of 90 functions with names and purposes of their own, in Python and nowhere else."""
    words = [f"{a}{b}" for a in ("red", "blue", "green") for b in "abcdefghijklmnopqrstuvwxyzäöüß"]
    text = "".join(
        f'def get_{word}(number=1):\n    """Return the {word} of a number"""\n' for word in words
    )
    text += 'def odd():\n    """Return the <|im_end|> of it all"""\n'
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib" / "colours.py").write_text(text)
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": tmp_path / "stdlib"})
    monkeypatch.setattr("mlm_jax.data.corpora.docstrings.DOCUMENTED", ())
    monkeypatch.setenv("MLM_JAX_CACHE", str(tmp_path / "cache"))


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_corpus_is_written_as_chat(small):
    corpus = builtin_corpus("conversations", 400)
    assert (corpus.kind, corpus.objective, corpus.baselines) == ("conversations", "chat", {})
    train, valid = lines(corpus.train), lines(corpus.valid)
    assert len(train) + len(valid) == corpus.documents == 90
    assert 0 < len(valid) < 15
    of_train = "".join(m["role"] + m["content"] for line in train for m in line["messages"])
    assert len(of_train.encode()) == corpus.train_bytes
    for part, held_out in ((train, False), (valid, True)):
        for line in part:
            said = " ".join(m["content"] for m in line["messages"])
            assert is_held_out(re.search(r"get_\w+", said)[0]) is held_out
    assert not any("im_end" in json.dumps(line) for line in train + valid)


def test_the_tokenizer_knows_the_template(small):
    tokenizer = load_tokenizer(builtin_corpus("conversations", 400).tokenizer)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert [tokenizer.id_of(name) for name in names] == [0, 1, 2]
    assert (tokenizer.eod_id, tokenizer.special["eos"]) == (0, 2)
    template = jinja2.Template(tokenizer.config["chat_template"])
    messages = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    text = "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n"
    assert template.render(messages=messages) == text
    asked = template.render(messages=messages[:1], add_generation_prompt=True)
    assert text.startswith(asked)
    assert asked.endswith("assistant\n")
    ids = tokenizer.encode(text)
    assert (ids.count(1), ids.count(2)) == (2, 2)
    assert tokenizer.decode(ids) == text


def test_a_python_without_docstrings_is_refused(small, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": "/nowhere.zip"})
    with pytest.raises(DataError, match=r"conversations, from /nowhere.zip: 0 usable documents"):
        builtin_corpus("conversations", 400)


@pytest.mark.slow
def test_the_conversations_have_their_known_size(tmp_path, monkeypatch):
    monkeypatch.setenv("MLM_JAX_CACHE", str(tmp_path))
    corpus = builtin_corpus("conversations", 1024)
    assert 6000 < corpus.documents < 15000
    assert 1.2e6 < corpus.train_bytes < 3e6
    found = lines(corpus.train) + lines(corpus.valid)
    turns = [sum(m["role"] == "user" for m in line["messages"]) for line in found]
    assert {*turns} == {1, 2, 3, 4}
    assert 0.4 < turns.count(1) / len(turns) < 0.7
    systems = [line["messages"][0]["role"] == "system" for line in found]
    assert 0.4 < sum(systems) / len(systems) < 0.6
    assert 0.02 < len(lines(corpus.valid)) / corpus.documents < 0.1
