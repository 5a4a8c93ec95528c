"""The faster encoder: the ids of `tokenizers`, or none at all."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from mlm_jax.data.tokenizer import batch_encoder, exact_bpe, load_tokenizer
from mlm_jax.data.tokenizer.batch_encoder import BatchEncoder, threads
from mlm_jax.data.tokenizer.byte_level import byte_level_backend, characters, token_of
from mlm_jax.data.tokenizer.split_patterns import CL100K, GPT2, LLAMA3, O200K, PYTHON
from mlm_jax.data.tokenizer.training import train_bpe

GOLDEN = Path(__file__).parents[2] / "golden" / "data"
TEXTS = [
    json.loads(line)["text"] for f in sorted(GOLDEN.glob("*.jsonl")) for line in f.open()
]  # fmt: skip
GOLDEN_BACKEND = load_tokenizer(GOLDEN / "tokenizer").backend
NASTY = st.one_of(
    st.text(),
    st.text(max_size=200).map(lambda text: text * 50),
    st.text(" \t\n\r\v\x1c\x85\xa0\u2003\u3000\ufeff'sStTLlRrEeVvDdMm\u017fK019٣²ǅßÉé漢\u0301_"),
    st.lists(
        st.sampled_from(
            [
                "<|endoftext|>",
                "<|endoftext|",
                "endoftext|>",
                "    ",
                "\n    ",
                "'ll",
                "return ",
                "é",
            ]
        )
    ).map("".join),
    st.tuples(st.sampled_from("aé= \n0_\0"), st.integers(90, 3000)).map(lambda t: t[0] * t[1]),
)


def model_of(backend) -> dict:
    return json.loads(backend.to_str())["model"]


def with_pattern(pattern: str) -> tokenizers.Tokenizer:
    """The golden merges under another pattern, with added tokens of several kinds."""
    model = model_of(GOLDEN_BACKEND)
    backend = byte_level_backend(model["vocab"], [tuple(m) for m in model["merges"]], pattern)
    backend.add_special_tokens(["<|endoftext|>"])
    backend.add_tokens([tokenizers.AddedToken("endoftext|", lstrip=True, single_word=True)])
    return backend


BACKENDS = [GOLDEN_BACKEND, *map(with_pattern, (GPT2, CL100K, LLAMA3, O200K, PYTHON))]
BACKENDS.append(train_bpe(TEXTS[:20], 1000).backend)
FASTER = [exact_bpe.exact_bpe(backend) for backend in BACKENDS]


def test_all_of_ours_have_a_faster_encoder():
    assert all(FASTER)


@given(NASTY)
@settings(deadline=None, max_examples=300)
def test_ids_are_the_same(text):
    for backend, faster in zip(BACKENDS, FASTER, strict=True):
        ids = faster(text)
        if ids is None:
            assert "endoftext|" in text
        else:
            assert ids.dtype == np.int32
            assert ids.tolist() == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.smoke
def test_all_golden_prose_has_the_same_ids():
    for backend, faster in zip(BACKENDS, FASTER, strict=True):
        expected = backend.encode_batch_fast(TEXTS, add_special_tokens=False)
        for text, encoding in zip(TEXTS, expected, strict=True):
            ids = faster(text)
            if ids is None:
                assert "endoftext|" in text
            else:
                assert ids.tolist() == encoding.ids


@given(st.data(), st.booleans())
@settings(deadline=None, max_examples=400)
def test_any_merges_at_all_are_the_same_or_refused(data, ignore_merges):
    """Also those that no training gives, whose tokens do not come out whole."""
    vocab = {characters(bytes([byte])): byte for byte in range(256)}
    names, merges = ["a", "b", "c"], []
    for _ in range(data.draw(st.integers(0, 14))):
        pair = data.draw(st.tuples(st.sampled_from(names), st.sampled_from(names)))
        if len(joined := "".join(pair)) < 9 and pair not in merges:
            merges.append(pair)
            vocab.setdefault(joined, len(vocab))
            names.append(joined)
    if data.draw(st.booleans()):
        vocab.setdefault(data.draw(st.text("abc", min_size=2, max_size=6)), len(vocab))
    backend = byte_level_backend(vocab, merges, GPT2, ignore_merges=ignore_merges)
    faster = exact_bpe.exact_bpe(backend)
    assume(faster is not None)
    for text in [*vocab, *data.draw(st.lists(st.text("abc ", max_size=60), max_size=5))]:
        assert faster(text).tolist() == backend.encode(text).ids


def test_tokens_that_do_not_come_out_whole():
    """bc is merged before ab, so that abc = ab + c is never made; tiktoken would take a + bc."""
    vocab = {characters(bytes([byte])): byte for byte in range(256)}
    vocab |= {"bc": 256, "ab": 257, "abc": 258}
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    without = exact_bpe.exact_bpe(byte_level_backend(vocab, merges, GPT2))
    assert without("abc").tolist() == [97, 256]
    assert exact_bpe.exact_bpe(byte_level_backend(vocab, merges, GPT2, ignore_merges=True)) is None


def changed(**parts) -> tokenizers.Tokenizer:
    state = json.loads(with_pattern(GPT2).to_str())
    state["model"] |= parts.pop("model", {})
    return tokenizers.Tokenizer.from_str(json.dumps(state | parts))


def pre_tokenized(pre_tokenizer) -> tokenizers.Tokenizer:
    backend = with_pattern(GPT2)
    backend.pre_tokenizer = pre_tokenizer
    return backend


def normalized() -> tokenizers.Tokenizer:
    backend = with_pattern(GPT2)
    backend.normalizer = normalizers.NFC()
    return backend


def split(regex: str, behavior: str, **byte_level) -> pre_tokenizers.Sequence:
    as_bytes = {"add_prefix_space": False, "use_regex": False} | byte_level
    words = pre_tokenizers.Split(tokenizers.Regex(regex), behavior)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(**as_bytes)])


@pytest.mark.parametrize(
    "backend",
    [
        normalized(),
        pre_tokenized(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        pre_tokenized(pre_tokenizers.Whitespace()),
        pre_tokenized(split(r"\w+|\W", "isolated")),  # not known to mean the same
        pre_tokenized(split(GPT2, "removed")),
        pre_tokenized(split(GPT2, "isolated", use_regex=True)),
        pre_tokenized(split(GPT2, "isolated", add_prefix_space=True)),
        changed(model={"dropout": 0.1}),
        changed(model={"byte_fallback": True}),
        changed(model={"end_of_word_suffix": "</w>"}),
        byte_level_backend({"a": 0, "b": 1}, [], GPT2),  # other bytes are lost
        tokenizers.Tokenizer(models.WordLevel({"a": 0})),
    ],
    ids=str,
)
def test_what_might_differ_is_refused(backend):
    assert exact_bpe.exact_bpe(backend) is None


def test_a_class_that_the_engines_read_differently_is_noticed(monkeypatch):
    assert not exact_bpe.same_characters("[[:alpha:]]")  # all letters, or those of ASCII
    assert exact_bpe.same_characters(r"\p{L}")
    monkeypatch.setattr(exact_bpe, "same_characters", lambda kind: kind != r"\p{N}")
    assert exact_bpe.exact_bpe(BACKENDS[1]) is None
    assert exact_bpe.exact_bpe(BACKENDS[-1])  # it has \s alone


def test_without_tiktoken_there_is_none(monkeypatch):
    monkeypatch.setattr(exact_bpe, "tiktoken", None)
    assert exact_bpe.exact_bpe(GOLDEN_BACKEND) is None


def test_long_words_take_no_square_of_their_length():
    faster, backend = FASTER[0], BACKENDS[0]
    for text in ("a" * 300_000, "=" * 300_000):
        assert faster(text).tolist() == backend.encode(text).ids
    assert faster(" " * 1_500_000 + "x") is None  # too much for its regex engine


def test_characters_stand_for_bytes():
    every = bytes(range(256))
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    assert set(characters(every)) == alphabet
    assert token_of(characters(every)) == every
    assert [token_of(text) for text in ("é漢", " ", "\xad", "\u0200")] == [None] * 4
    word = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert characters(" é漢".encode()) == word.pre_tokenize_str(" é漢")[0][0]


# Many texts


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(batch_encoder, "WORTH_IT", 0)


STRANGE = ["", "<|endoftext|> a", "naïve 漢字 🙂\t\r\n\n  \x00", "x" * 5000, *TEXTS[:40]]


@pytest.mark.parametrize("n", ["1", "2", ""])
def test_many_texts_by_either_way(at_once, monkeypatch, n):
    monkeypatch.setenv("RAYON_NUM_THREADS", n)
    encode = BatchEncoder(GOLDEN_BACKEND)
    for texts in (STRANGE, STRANGE[::-1], []):
        expected = [GOLDEN_BACKEND.encode(t, add_special_tokens=False).ids for t in texts]
        found = encode(texts)
        assert [ids.tolist() for ids in found] == expected
        assert all(ids.dtype == np.int32 for ids in found)
    assert encode.faster is not None


def test_threads(monkeypatch):
    monkeypatch.setenv("RAYON_NUM_THREADS", "3")
    assert threads() == 3
    monkeypatch.setenv("RAYON_NUM_THREADS", "0")
    assert threads() >= 1


def test_few_texts_wait_for_no_proof():
    encode = BatchEncoder(GOLDEN_BACKEND)
    encode(TEXTS[:2])
    assert "faster" not in vars(encode)


def test_it_goes_to_another_process(at_once):
    encode = BatchEncoder(GOLDEN_BACKEND)
    encode(TEXTS[:3])
    again = pickle.loads(pickle.dumps(encode))
    assert "faster" not in vars(again)
    assert np.array_equal(again(TEXTS[:3])[0], encode(TEXTS[:3])[0])
