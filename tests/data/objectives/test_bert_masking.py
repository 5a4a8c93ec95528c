"""BERT's samples beside megatron-core's own, and the shares that the paper names."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mlm_jax.data.objectives.bert_masking import (
    BertTokens,
    bert_row,
    bert_tokens,
    mask_words,
    sentence_pair,
)
from mlm_jax.data.objectives.masked_words import picked_spans, whole_words
from mlm_jax.errors import DataError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/objectives/masked.json").read_text())
SENTENCES = [np.array(sentence) for sentence in GOLDEN["sentences"]]
CONTINUES = np.array([id > 5 and id % 3 == 2 for id in range(GOLDEN["vocab_size"])])
IDS = BertTokens(cls=1, sep=2, mask=3, pad=0, vocab_size=GOLDEN["vocab_size"])
THEIRS = {
    "tokens": "text", "types": "types", "weights": "loss_mask", "mask": "padding_mask",
    "swapped": "is_random",
}  # fmt: skip


def row(sentences, seed=0, **settings):
    given = {"ids": IDS, "continues": CONTINUES, "seq_len": 64, **settings}
    return bert_row(sentences, np.random.RandomState(seed), **given)


@pytest.mark.smoke
@pytest.mark.parametrize("case", ["bert", "bert_one_segment"])
def test_equals_megatron(case):
    for i, golden in enumerate(GOLDEN[case]):
        first, end, target_length = golden["sample"]
        ours = row(
            SENTENCES[first:end], GOLDEN["seed"] + i, target_length=target_length,
            sentence_order=case == "bert",
        )  # fmt: skip
        for name, theirs in THEIRS.items():
            np.testing.assert_array_equal(ours[name], golden[theirs], err_msg=f"{name} of {i}")
        predicted = ours["weights"] == 1
        np.testing.assert_array_equal(np.where(predicted, ours["targets"], -1), golden["labels"])


def test_a_row_is_what_a_model_reads():
    got = row(SENTENCES[:4])
    assert {name: (x.dtype.name, x.shape) for name, x in got.items()} == {
        "tokens": ("int32", (64,)), "targets": ("int32", (64,)), "weights": ("float32", (64,)),
        "types": ("int32", (64,)), "mask": ("bool", (64,)), "swapped": ("int32", ()),
    }  # fmt: skip
    n = got["mask"].sum()
    assert (got["tokens"][n:] == IDS.pad).all()
    assert (got["weights"][n:] == 0).all()


def test_whole_words_and_nothing_special():
    tokens = np.array([1, 8, 6, 8, 11, 2, 8, 7, 2])
    assert whole_words(tokens, CONTINUES, (1, 2)) == [[1], [2, 3, 4, 6], [7]]
    each = np.zeros(len(CONTINUES), bool)
    assert whole_words(tokens[:3], each) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("n", "target_length", "most"),
    [(100, 509, 15), (3, 509, 1), (512, 509, 76)],  # rounded, at least one, at most 0.15 * 509
)
def test_the_budget(n, target_length, most):
    tokens, rng = np.full(n, 6), np.random.RandomState(0)
    limits = {"target_length": target_length, "rate": 0.15, "max_ngram": 1}
    assert len([*picked_spans(tokens, CONTINUES, rng, **limits)]) == most


def test_masks_are_80_10_10_of_15_percent():
    rng = np.random.RandomState(0)
    tokens = rng.randint(6, 64, 200_000).astype(np.int32)
    ids = IDS._replace(vocab_size=30_000)
    spans = ([place] for place in range(30_000))
    hidden, predicted = mask_words(tokens, spans, rng, ids)
    assert predicted.sum() == 30_000
    np.testing.assert_array_equal(hidden[~predicted], tokens[~predicted])
    hidden, tokens = hidden[predicted], tokens[predicted]
    assert (hidden == IDS.mask).mean() == pytest.approx(0.8, abs=0.01)
    assert (hidden == tokens).mean() == pytest.approx(0.1, abs=0.01)
    assert hidden.max() > 29_000


@pytest.mark.parametrize(
    ("geometric", "odds"), [(False, [6 / 11, 3 / 11, 2 / 11]), (True, [0.2, 0.16, 0.64])]
)
def test_sizes_of_ngrams(geometric, odds):
    tokens, rng, sizes = np.full(3_000, 6), np.random.RandomState(0), []
    limits = {"target_length": 3_000, "rate": 0.01, "max_ngram": 3, "geometric": geometric}
    for _ in range(400):  # few of many, so that they hardly meet
        sizes += map(len, picked_spans(tokens, CONTINUES, rng, **limits))
    shares = np.bincount(sizes, minlength=4)[1:] / len(sizes)
    np.testing.assert_allclose(shares, odds, atol=0.05)


def test_spans_are_apart_within_the_budget_and_whole():
    tokens = np.concatenate(SENTENCES)
    words = whole_words(tokens, CONTINUES)
    word_of = {place: w for w, places in enumerate(words) for place in places}
    rng = np.random.RandomState(1)
    for rate in (0, 0.01, 0.15, 0.5, 1):
        limits = {"target_length": len(tokens), "rate": rate, "max_ngram": 3}
        spans = list(picked_spans(tokens, CONTINUES, rng, **limits))
        places = [place for span in spans for place in span]
        assert len(places) == len(set(places)) <= rate * len(tokens)
        for span in spans:
            assert 1 <= len({word_of[place] for place in span}) <= 3
            assert all(set(words[word_of[place]]) <= set(span) for place in span)


def test_segments_are_swapped_half_of_the_time_and_none_is_lost():
    rng, swapped, first_lengths = np.random.RandomState(0), 0, set()
    whole = np.concatenate(SENTENCES[:4])
    for _ in range(400):
        pair = sentence_pair(SENTENCES[:4], rng, IDS, 61)
        a, b = pair.tokens[1:-1][pair.types[1:-1] == 0][:-1], pair.tokens[pair.types == 1][:-1]
        np.testing.assert_array_equal(np.concatenate([b, a] if pair.swapped else [a, b]), whole)
        swapped += pair.swapped
        first_lengths.add(len(b if pair.swapped else a))
    assert swapped == pytest.approx(200, abs=40)
    assert first_lengths == set(np.cumsum([len(s) for s in SENTENCES[:3]]).tolist())


@pytest.mark.parametrize("target_length", [1, 2, 7, 30])
def test_long_segments_are_shortened_to_equal_halves(target_length):
    long = [np.arange(6, 40), np.arange(6, 26)]
    pair = sentence_pair(long, np.random.RandomState(0), IDS, target_length)
    assert len(pair.tokens) == target_length + 2 + (target_length > 1)
    b = max((pair.types == 1).sum() - 1, 0)
    assert abs(target_length - 2 * b) <= 1
    assert (np.diff(pair.tokens[pair.types == 1][:-1]) == 1).all()  # from the ends only


@pytest.mark.parametrize("target_length", [0, 62])
def test_a_target_length_that_does_not_fit_is_refused(target_length):
    with pytest.raises(DataError, match=f"target_length={target_length} .* seq_len=64; try 61"):
        row(SENTENCES[:2], target_length=target_length)


def test_one_sentence_has_no_order():
    with pytest.raises(DataError, match="1 sentence has no order"):
        row(SENTENCES[:1])
    assert row(SENTENCES[:1], sentence_order=False)["types"].max() == 0


def test_special_tokens_come_from_the_tokenizer():
    special = {"cls": 1, "sep": 2, "mask": 3, "pad": 0}
    tokenizer = SimpleNamespace(special=special, vocab_size=64)
    assert bert_tokens(tokenizer) == IDS
    tokenizer.special = {"cls": 1, "pad": 0}
    with pytest.raises(DataError, match=r"no token for sep, mask.*'sep_token'"):
        bert_tokens(tokenizer)
