"""From files to tokens: what is trained, and that no token reaches over an edge."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mlm_jax.data.objectives.examples import (
    Text,
    chat_examples,
    encode,
    pair_examples,
    preference_examples,
)
from mlm_jax.data.tokenizer.fast import FastTokenizer
from mlm_jax.data.tokenizer.training import train_bpe
from mlm_jax.errors import DataError
from tests.data.chat_templates import CONVERSATIONS, TEMPLATES, chat_backend, tagged, turns

CONFIG = {
    "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
    "chat_template": tagged(TEMPLATES["qwen"], False),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return FastTokenizer(chat_backend(), CONFIG)


@pytest.fixture
def write(tmp_path):
    def write(*records, name="x.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
        return tmp_path / name

    return write


def pieces(example, tokenizer):
    """[(text, whether it is trained)]: of tokens that follow each other."""
    cuts = np.flatnonzero(np.diff(example.trained)) + 1
    parts = zip(np.split(example.tokens, cuts), np.split(example.trained, cuts), strict=True)
    return [(tokenizer.decode(tokens), bool(trained[0])) for tokens, trained in parts]


def test_chats(tokenizer, write):
    system, tools = CONVERSATIONS["system"], CONVERSATIONS["tools"]
    first, second = chat_examples(write(system, tools), tokenizer)
    assert pieces(first, tokenizer) == [
        ("<|im_start|>system\n  Answer briefly. <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
         "<|im_start|>assistant\n", False),
        ("Hello there!<|im_end|>", True),
        ("\n", False),
    ]  # fmt: skip
    said = [text for text, trained in pieces(second, tokenizer) if trained]
    assert said[0].startswith("Adding.\n<tool_call>\n{")
    assert said[1] == "It is 3.<|im_end|>"
    assert "<tools>" in pieces(second, tokenizer)[0][0]
    assert (first.tokens.dtype, first.trained.dtype) == (np.int32, bool)


def test_many_chats_are_each_as_if_alone(tokenizer, write, monkeypatch):
    records = [{"messages": turns(f"question {i}", f"answer {i}", "x", "y")} for i in range(7)]
    together = chat_examples(write(*records), tokenizer)
    monkeypatch.setattr("mlm_jax.data.objectives.examples.CHUNK", 3)
    in_chunks = chat_examples(write(*records), tokenizer)
    alone = [chat_examples(write(record), tokenizer)[0] for record in records]
    for got in (together, in_chunks):
        for a, b in zip(got, alone, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.trained, b.trained)


def test_what_a_template_refuses_is_named_by_line(write):
    strict = FastTokenizer(chat_backend(), {**CONFIG, "chat_template": TEMPLATES["mistral"]})
    good, bad = CONVERSATIONS["one"], {"messages": [*turns("a", "b"), *turns("c", "d")[1:]]}
    with pytest.raises(DataError) as error:
        chat_examples(write(good, bad, good, bad), strict)
    lines = str(error.value).split("\n")
    assert [line.split(": ")[0][-6:] for line in lines] == ["line 2", "line 4"]
    assert "turns must alternate" in lines[0]


def test_a_template_without_the_answers_is_refused(write):
    deaf = "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}"
    tokenizer = FastTokenizer(chat_backend(), {**CONFIG, "chat_template": deaf})
    with pytest.raises(DataError, match=r"line 1: in the text .* an assistant says nothing"):
        chat_examples(write(CONVERSATIONS["one"]), tokenizer)


def test_pairs(tokenizer, write):
    file = write({"source": "one two", "target": "un deux"}, {"source": "{x}", "target": ""})
    first, second = pair_examples(file, tokenizer)
    assert pieces(first, tokenizer) == [("one two\n", False), ("un deux<|endoftext|>", True)]
    assert pieces(second, tokenizer) == [("{x}\n", False), ("<|endoftext|>", True)]


def test_preferences(tokenizer, write):
    one = turns("q", "good", system="s")
    chat = {"prompt": [*turns("q0", "a0"), *turns("q")], "chosen": turns("", "good")[1:],
            "rejected": turns("", "bad")[1:]}  # fmt: skip
    records = [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        chat,
        {"chosen": one, "rejected": [*one[:-1], {"role": "assistant", "content": "bad"}]},
    ]
    for i, (chosen, rejected) in enumerate(preference_examples(write(*records), tokenizer)):
        n = chosen.trained.argmax()
        assert n == rejected.trained.argmax() > 0
        np.testing.assert_array_equal(chosen.tokens[:n], rejected.tokens[:n])
        end = "<|im_end|>" if i else "<|endoftext|>"
        trained = [
            "".join(text for text, is_trained in pieces(example, tokenizer) if is_trained)
            for example in (chosen, rejected)
        ]
        assert trained == [f"good{end}", f"bad{end}"]


def test_no_token_reaches_over_an_edge():
    tokenizer = train_bpe(["hello hello hello"] * 9, 260)
    assert len(tokenizer.encode("hello")) < 4
    text = Text([("hel", False), ("lo", True)], closed=True)
    (example,) = encode([text], tokenizer)
    assert pieces(example, tokenizer) == [("hel", False), ("lo<|endoftext|>", True)]


def test_an_answer_has_the_pieces_of_the_middle_of_a_text():
    """SentencePiece begins each text with a space; what goes on within one has none."""
    vocab = {"</s>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "▁b": 5, ":": 6}
    merges = [("▁", "a"), ("▁", "b")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=True)
    backend.decoder = decoders.Metaspace("▁", prepend_scheme="first")
    tokenizer = FastTokenizer(backend)
    assert tokenizer.encode("b") == [5]
    (example,) = encode([Text([("a:", False), ("b", True), (" a", False)], False)], tokenizer)
    assert example.tokens.tolist() == [4, 6, 3, 4] == tokenizer.encode("a:b a")


def test_targets_need_an_end(write):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(DataError, match=r"targets end with an EOD, the tokenizer has none of <\|"):
        pair_examples(write({"source": "a", "target": "a"}), FastTokenizer(backend))
