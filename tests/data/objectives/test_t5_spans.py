"""T5's samples beside megatron-core's own; and that no token is lost or repeated."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm_jax.data.objectives.t5_spans import T5Tokens, ngram_spans, noise_spans, t5_row, t5_tokens
from mlm_jax.errors import DataError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/objectives/masked.json").read_text())
SENTENCES = [np.array(sentence) for sentence in GOLDEN["sentences"]]
CONTINUES = np.array([id > 5 and id % 3 == 2 for id in range(GOLDEN["vocab_size"])])
IDS = T5Tokens(sentinels=range(40, 64), bos=4, eos=5, pad=0)
LENGTHS = {"encoder_length": 64, "decoder_length": 32}
THEIRS = {
    "tokens": "text_enc", "mask": "enc_mask", "decoder_tokens": "text_dec", "weights": "loss_mask",
}  # fmt: skip


@pytest.mark.smoke
def test_equals_megatron():
    for i, golden in enumerate(GOLDEN["t5"]):
        first, end, target_length = golden["sample"]
        tokens = np.concatenate(SENTENCES[first:end])[:target_length]
        rng = np.random.RandomState(GOLDEN["seed"] + i)
        spans = ngram_spans(tokens, rng, continues=CONTINUES, target_length=target_length)
        ours = t5_row(tokens, spans, ids=IDS, **LENGTHS)
        for name, theirs in THEIRS.items():
            np.testing.assert_array_equal(ours[name], golden[theirs], err_msg=f"{name} of {i}")
        trained = ours["weights"] == 1
        np.testing.assert_array_equal(np.where(trained, ours["targets"], -1), golden["labels"])


def test_a_row_by_hand():
    text = np.arange(10, 20)
    row = t5_row(text, [(2, 4), (8, 9)], ids=IDS, encoder_length=11, decoder_length=8)
    assert {name: x.tolist() for name, x in row.items()} == {
        "tokens": [10, 11, 40, 14, 15, 16, 17, 41, 19, 0, 0],
        "mask": [True] * 9 + [False] * 2,
        "decoder_tokens": [4, 40, 12, 13, 41, 18, 0, 0],
        "targets": [40, 12, 13, 41, 18, 5, 0, 0],
        "weights": [1, 1, 1, 1, 1, 1, 0, 0],
    }
    assert [x.dtype.name for x in row.values()] == ["int32", "bool", "int32", "int32", "float32"]


@given(n=st.integers(2, 60), seed=st.integers(0, 10_000), paper=st.booleans())
def test_every_token_is_in_the_encoder_or_in_the_targets(n, seed, paper):
    rng = np.random.RandomState(seed)
    tokens = rng.randint(6, 40, n)
    if paper:
        spans = noise_spans(n, rng)
    else:
        spans = ngram_spans(tokens, rng, continues=CONTINUES, target_length=n)
    row = t5_row(tokens, spans, ids=IDS, **LENGTHS)
    encoder = row["tokens"][row["mask"]].tolist()
    written = row["targets"][row["weights"] == 1].tolist()
    assert written.pop() == IDS.eos
    assert row["decoder_tokens"][: len(written) + 1].tolist() == [IDS.bos, *written]
    sentinels = [t for t in encoder if t >= 40]
    assert sentinels == list(range(40, 40 + len(spans)))
    assert [t for t in written if t >= 40] == sentinels
    assert put_back(encoder, written) == tokens.tolist()


def put_back(encoder, written):
    """The text: each sentinel of the encoder replaced by what is written behind it."""
    spans = {}
    for token in written:
        if token >= 40:
            last = spans.setdefault(token, [])
        else:
            last.append(token)
    return [t for token in encoder for t in spans.get(token, [token])]


def test_the_papers_share_and_mean_length():
    rng = np.random.RandomState(0)
    begins = np.zeros(512)
    for _ in range(400):
        spans = noise_spans(512, rng)
        lengths = [end - begin for begin, end in spans]
        assert sum(lengths) == 77  # 0.15 * 512
        assert len(spans) == 26  # 77 / 3
        begins[[begin for begin, _ in spans]] += 1
    assert begins[0] == 0  # a text begins with itself
    assert (begins[1:500] > 0).mean() > 0.98


@pytest.mark.parametrize(("n", "density", "mean"), [(2, 0.15, 3), (10, 0.99, 1), (40, 0.5, 1)])
def test_spans_do_not_touch(n, density, mean):
    spans = noise_spans(n, np.random.RandomState(0), density=density, mean_length=mean)
    ends = [0, *(end for _, end in spans)]
    assert all(begin > end for (begin, _), end in zip(spans, ends, strict=False))
    assert ends[-1] == n


@pytest.mark.parametrize("n", [0, 1])
def test_a_text_too_short_for_a_span_is_refused(n):
    with pytest.raises(DataError, match=f"{n} token cannot"):
        noise_spans(n, np.random.RandomState(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ids": IDS._replace(sentinels=[9])}, "2 spans need as many .* has 1.* <extra_id_1>"),
        ({"encoder_length": 8}, "encoder_length=8 does not hold the 9 tokens .* try 9"),
        ({"decoder_length": 5}, "decoder_length=5 does not hold the 6 tokens .* try 6"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    given = {"ids": IDS, **LENGTHS, **settings}
    with pytest.raises(DataError, match=message):
        t5_row(np.arange(10), [(2, 4), (8, 9)], **given)


def test_special_tokens_come_from_the_tokenizer():
    names = {"<extra_id_0>": 9, "<extra_id_1>": 8, "<extra_id_3>": 7}
    tokenizer = SimpleNamespace(id_of=names.get, special={"eos": 1, "pad": 0})
    assert t5_tokens(tokenizer) == T5Tokens([9, 8], bos=0, eos=1, pad=0)
    tokenizer.special["bos"] = 2
    assert t5_tokens(tokenizer).bos == 2
    tokenizer.special = {"pad": 0}
    with pytest.raises(DataError, match=r"no token for eos, which T5 .*'eos_token'"):
        t5_tokens(tokenizer)
    empty = SimpleNamespace(id_of={}.get, special={"eos": 1, "pad": 0})
    with pytest.raises(DataError, match="lacks <extra_id_0>"):
        t5_tokens(empty)
