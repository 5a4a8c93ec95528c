import ast
import json
import re

import jinja2
import pytest

from mlm_jax.data.builtin import builtin_corpus
from mlm_jax.data.corpora import conversations, sources
from mlm_jax.data.corpora.conversations import WORDS, answers_on, conversation, enumerated, taken
from mlm_jax.data.corpora.docstrings import docstrings
from mlm_jax.data.corpora.sources import Package, is_held_out
from mlm_jax.data.corpora.subjects import arguments, example, sentence, subject, third_person
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.errors import DataError

MODULE = '''
def wrap(text, width=70, *, _fast=True):
    """Split the ``text`` into lines.

    No line is longer than the width that was asked for.

    Args:
      text: This describes an argument and nothing else.

    >>> from text import wrap
    >>> wrap("a b", 1)
    ['a', 'b']
    """

class Wrapper:
    """A tool that wraps."""
    def __init__(self, width=70, **rest): pass
    def run(self, text): "Wraps a text and returns it."
    @property
    def lines(self): "The lines of the last text."
    @staticmethod
    def default(): "Get the width of the terminal."

def see():
    """See the module above for all of this."""

def _hidden():
    """Return what is hidden here."""

def again():
    """The lines of the last text!"""
'''


@pytest.fixture
def subjects(tmp_path):
    """Of MODULE, in a public and in a private module, by the last of their names."""

    def of(module: str, prefix: str = "pkg."):
        (tmp_path / f"{module}.py").write_text(MODULE)
        package = Package("pkg", "1.0", "MIT", tmp_path, prefix)
        found = [subject(package, d) for d in docstrings(package) if d.public]
        return {s.name: s for s in found if s}

    return of


def test_what_is_known_of_a_function(subjects):
    found = subjects("text")
    assert found.keys() == {
        "wrap", "Wrapper", "Wrapper.run", "Wrapper.lines", "Wrapper.default", "again",
    }  # fmt: skip
    wrap = found["wrap"]
    assert (wrap.full, wrap.home, wrap.is_class) == ("`pkg.text.wrap`", "pkg.text", False)
    assert wrap.summary == "Split the `text` into lines."
    assert wrap.more == "No line is longer than the width that was asked for."
    assert wrap.arguments == (("text", None), ("width", "70"), ("_fast", "True"))
    assert wrap.example == ">>> from text import wrap\n>>> wrap(\"a b\", 1)\n['a', 'b']"
    assert found["Wrapper"].arguments == (("width", "70"), ("**rest", None))
    assert found["Wrapper.run"].arguments == (("text", None),)
    assert found["Wrapper.lines"].arguments is None
    assert found["Wrapper.default"].arguments == ()


def test_private_modules_are_not_named(subjects):
    assert subjects("_text")["wrap"].full == "pkg's `wrap`"
    assert "where" not in answers_on(subjects("_text")["wrap"])
    assert subjects("_text", prefix="") == {}  # Python's own


def test_answers(subjects):
    assert answers_on(subjects("text")["wrap"]) == {
        "what": "It splits the `text` into lines.",
        "which": "That is `pkg.text.wrap`.",
        "more": "No line is longer than the width that was asked for.",
        "default": "`70`.",
        "example": "```python\n>>> from text import wrap\n>>> wrap(\"a b\", 1)\n['a', 'b']\n```",
        "where": "In the module `pkg.text`: `from pkg.text import wrap`.",
        "arguments": "It takes `text`, and optionally `width` and `_fast`.",
        "call": "`wrap(text, width=70, _fast=True)`",
    }


@pytest.mark.smoke
def test_conversations_have_their_form(subjects):
    found = list(subjects("text").values()) + list(subjects("_text").values())
    for s in found:
        messages = conversation(s)
        assert messages == conversation(s)
        roles = [message["role"] for message in messages]
        spoken = roles[roles[0] == "system" :]
        assert spoken == ["user", "assistant"] * (len(spoken) // 2)
        assert 1 <= len(spoken) // 2 <= 4
        first = messages[roles.index("user")]["content"]
        assert s.full in first or s.summary in first
        assert all(message["content"].strip() for message in messages)
        assert "{" not in first


def test_what_has_two_answers_is_not_asked(tmp_path):
    (tmp_path / "text.py").write_text(MODULE)
    found = conversations.harvest([Package("pkg", "1.0", "MIT", tmp_path, "pkg.")])
    # `lines` and `again` have the same summary.
    assert sorted(e.source for e in found) == ["Wrapper", "default", "run", "wrap"]


@pytest.mark.parametrize(
    ("summary", "answer"),
    [
        ("Return the sum.", "It returns the sum."),
        ("Returns the sum.", "It returns the sum."),
        ("Copy it.", "It copies it."),
        ("Display it.", "It displays it."),
        ("Fetch it.", "It fetches it."),
        ("Pop and return it.", "Pop and return it."),
        ("The sum of all.", "The sum of all."),
    ],
)
def test_third_person(summary, answer):
    assert third_person(summary) == answer


@pytest.mark.parametrize(
    ("block", "read"),
    [
        ("Return the sum", "Return the sum."),
        ("Return the\nsum", ""),
        ("Return the ``sum``.", "Return the `sum`."),
        ("sum(a, b) -> int", ""),
        ("Two words.", ""),
        ("See the function above for more.", ""),
        ("Return " + "very " * 60 + "much.", ""),
    ],
)
def test_sentences_that_stand_alone(block, read):
    assert sentence(block) == read


def test_arguments_that_are_not_told():
    def of(source: str, **flags: bool):
        return arguments(ast.parse(source).body[0], is_method=flags.get("is_method", False))

    assert of("def f(a, /, b=(), *c, d, e=None, **f): 0") == (
        ("a", None), ("b", "()"), ("*c", None), ("d", None), ("e", "None"), ("**f", None),
    )  # fmt: skip
    assert of("@special\ndef f(self, a): 0") is None  # the decorator calls it
    assert of("@classmethod\ndef f(cls, a): 0", is_method=True) == (("a", None),)
    assert of("class A: pass") is None
    assert of(f"def f(a='{'long' * 30}'): 0") is None


def test_examples_that_are_not_shown():
    assert example(">>> a = 1\n>>> f(a)\n2\n", "f") == ">>> a = 1\n>>> f(a)\n2"
    assert example(">>> for a in b:\n...     f(a)\n2\n", "f").splitlines()[1] == "...     f(a)"
    assert example(">>> g(1)\n2\n", "f") == ""
    assert example(">>> f(1)\n", "f") == ""
    assert example(">>> f(1)\nTraceback (most recent call last):\nX\n", "f") == ""
    assert example(">>> f(1)  # doctest: +SKIP\n2\n", "f") == ""
    assert example(f">>> f(1)\n{'2' * 400}\n", "f") == ""
    assert example(">>>f(1)\n2\n", "f") == ""  # not well formed


def test_lists_in_words():
    assert enumerated([]) == ""
    assert enumerated(["a", "b", "c"]) == "a, b and c"
    assert taken(()) == "It takes nothing."
    assert taken((("a", None),)) == "It takes `a`."
    assert taken((("a", "1"),)) == "It optionally takes `a`."


def test_every_question_has_words():
    used = {field for pair in WORDS.values() for ways in pair for way in ways
            for field in re.findall(r"{(\w+)}", way)}  # fmt: skip
    assert used == {"x", "home", "summary", "name"}


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
    monkeypatch.setattr("mlm_jax.data.corpora.docstrings.DOCUMENTED", {})
    monkeypatch.setenv("MLM_JAX_CACHE", str(tmp_path / "cache"))


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_corpus_is_written_as_chat(small):
    corpus = builtin_corpus("conversations", 400)
    assert (corpus.kind, corpus.objective, corpus.baselines) == ("conversations", "chat", {})
    train, valid = lines(corpus.train), lines(corpus.valid)
    assert len(train) + len(valid) == corpus.documents == 90
    assert 0 < len(valid) < 15
    of_train = "".join(m["content"] for line in train for m in line["messages"])
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
    assert corpus.documents == conversations.CONVERSATIONS
    assert 0.7e6 < corpus.train_bytes < 1.3e6
    found = lines(corpus.train) + lines(corpus.valid)
    turns = [sum(m["role"] == "user" for m in line["messages"]) for line in found]
    assert {*turns} == {1, 2, 3, 4}
    assert 0.3 < turns.count(1) / len(turns) < 0.6
    systems = [line["messages"][0]["role"] == "system" for line in found]
    assert 0.4 < sum(systems) / len(systems) < 0.6
    assert 0.02 < len(lines(corpus.valid)) / corpus.documents < 0.1
