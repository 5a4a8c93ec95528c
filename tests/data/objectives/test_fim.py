"""Fill-in-the-middle beside Megatron-LM's, and what a model must be able to read back."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_jax.data.objectives.fim import NAMES, Fim, FimTokens, fill_in_the_middle, fim_tokens
from mlm_jax.data.tokenizer.training import train_bpe
from mlm_jax.errors import DataError

GOLDEN = Path(__file__).parents[2] / "golden" / "data"
TEXTS = [json.loads(line)["text"] for line in (GOLDEN / "prose_b.jsonl").open()]
TOKENIZER = train_bpe(TEXTS[:4], 600, ("<|endoftext|>", *NAMES[0]))
IDS, EOD = FimTokens(1, 2, 3, 4), 0
WORDS = "def f(x):\n    return 'naïve' + \"漢字\"  # 🙂\n" * 3


def documents(*texts: str) -> list[np.ndarray]:
    return [np.array([*TOKENIZER.encode(text), EOD]) for text in texts]


def fim(**settings) -> Fim:
    return Fim(TOKENIZER, IDS, **settings)


def read_back(document: np.ndarray) -> str:
    """The text that one rearranged document, without EOD, was made from."""
    ids = document.tolist()
    middle = ids.index(IDS.middle)
    if ids[1] == IDS.suffix and IDS.suffix not in ids[2:]:  # SPM, or PSM without a prefix
        suffix, rest = ids[2:middle], ids[middle + 1 :]
        return TOKENIZER.decode(rest) + TOKENIZER.decode(suffix)
    between = ids.index(IDS.suffix)
    parts = ids[1:between], ids[middle + 1 :], ids[between + 1 : middle]
    return "".join(map(TOKENIZER.decode, parts))


@pytest.mark.parametrize("spm_rate", [0, 0.5, 1])
@settings(deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_text_comes_back(spm_rate, seed):
    piece = np.array(TOKENIZER.encode(WORDS))
    room = [piece, np.full(400, EOD)]  # so that nothing is cut off
    new, _ = fill_in_the_middle(room, np.random.RandomState(seed), fim(rate=1, spm_rate=spm_rate))
    assert read_back(new[0]) == WORDS


@settings(deadline=None)
@given(
    texts=st.lists(st.text("ab \n(漢", min_size=1, max_size=30), min_size=1, max_size=5),
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([0, 0.5, 1]),
)
def test_equals_megatron_where_documents_end_with_eod(texts, seed, rate):
    pieces = documents(*texts)
    pieces[-1] = pieces[-1][:-1]  # a sample ends within a document
    given = fim(rate=rate)
    got, padding = fill_in_the_middle(pieces, np.random.RandomState(seed), given)
    expected = megatron_sample(np.concatenate(pieces), np.random.RandomState(seed), given)
    np.testing.assert_array_equal(np.concatenate(got), expected)
    assert padding == expected.count(IDS.pad)


def megatron_sample(sample, rng, fim):
    """What GPTFIMDataset makes of a sample, step by step."""
    new, begin = [], 0
    for end in np.flatnonzero(sample == EOD):
        if end > begin:
            new += [*megatron_permuted(sample[begin:end], rng, fim), EOD]
        begin = end + 1
    new += megatron_permuted(sample[begin:], rng, fim)
    return (new + [IDS.pad] * len(sample))[: len(sample)]


def megatron_permuted(tokens, rng, fim):
    if not rng.binomial(1, fim.rate):
        return list(tokens)
    text = TOKENIZER.decode(tokens)
    a, b = sorted(rng.randint(low=0, high=len(text) + 1, size=2))
    p, m, s = (TOKENIZER.encode(part) for part in (text[:a], text[a:b], text[b:]))
    if rng.binomial(1, fim.spm_rate):
        return [IDS.prefix, IDS.suffix, *s, IDS.middle, *p, *m]
    return [IDS.prefix, *p, IDS.suffix, *s, IDS.middle, *m]


def test_documents_stay_apart_and_keep_their_end():
    pieces = [*documents("one two three", "four", ""), np.array(TOKENIZER.encode("five " * 40))]
    new, padding = fill_in_the_middle(pieces, np.random.RandomState(0), fim(rate=1))
    assert padding == 0
    assert sum(map(len, new)) == sum(map(len, pieces))
    assert [piece[-1] for piece in new[:3]] == [EOD] * 3
    assert [read_back(piece[:-1]) for piece in new[:2]] == ["one two three", "four"]
    assert new[2].tolist() == [EOD]  # an empty document
    assert {piece.dtype.name for piece in new} == {"int32"}


def test_rates_are_shares():
    pieces = documents(*["some words here"] * 2000)
    new, _ = fill_in_the_middle(pieces, np.random.RandomState(0), fim(rate=0.3, spm_rate=0.8))
    starts = [piece[:2].tolist() for piece in new if len(piece) > 1]
    hit = np.mean([first == IDS.prefix for first, _ in starts[:1500]])  # a last one may be cut
    assert hit == pytest.approx(0.3, abs=0.03)
    spm = np.mean([second == IDS.suffix for first, second in starts if first == IDS.prefix])
    assert spm == pytest.approx(0.8, abs=0.08)  # and PSM whose prefix is empty
    same, _ = fill_in_the_middle(pieces, np.random.RandomState(0), fim(rate=0))
    assert all(map(np.array_equal, same, pieces))


def test_fewer_tokens_are_filled_up():
    letters = np.array([TOKENIZER.encode(c)[0] for c in "return return return"])
    assert len(TOKENIZER.encode("return return return")) + 3 < len(letters)
    new, padding = fill_in_the_middle([letters], np.random.RandomState(3), fim(rate=1))
    assert sum(map(len, new)) == len(letters)
    assert padding == len(new[-1]) > 0
    assert (new[-1] == IDS.pad).all()
    assert IDS.pad not in new[0]


def test_a_character_cut_at_the_edge_is_not_replaced():
    piece = np.array(TOKENIZER.encode("漢")[1:] + TOKENIZER.encode(" and more"))
    new, _ = fill_in_the_middle([piece], np.random.RandomState(0), fim(rate=1))
    np.testing.assert_array_equal(new[0], piece)


def test_tokens_by_their_usual_names():
    assert fim_tokens(TOKENIZER) == IDS
    for names in NAMES[1:]:
        tokenizer = train_bpe([], 300, ("<eod>", *names))
        assert fim_tokens(tokenizer) == FimTokens(1, 2, 3, 4)
    assert fim_tokens(TOKENIZER, "<fim_suffix>, <fim_middle>, <fim_prefix>, <|endoftext|>") == (
        FimTokens(3, 2, 1, 0)
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, r"data.fim_tokens=None.*<fim_prefix>.*▁<PRE>"),
        ("<a>,<b>,<|endoftext|>,<c>", r"data.fim_tokens=<a>,<b>,<\|endoftext\|>,<c>"),
        ("<|endoftext|>,<|endoftext|>", "name four"),
    ],
)
def test_a_tokenizer_without_the_tokens_is_refused(names, message):
    with pytest.raises(DataError, match=message):
        fim_tokens(train_bpe([], 257), names)


@pytest.mark.parametrize("name", ["rate", "spm_rate"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_rates_outside_0_to_1_are_refused(name, value):
    with pytest.raises(DataError, match=f"^data.fim_{name}={value}"):
        fim(**{name: value})
