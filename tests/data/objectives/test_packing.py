"""First-fit beside the naive one; and rows in which no example meets another."""

import logging
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm_jax.data.objectives.examples import Example
from mlm_jax.data.objectives.packing import PackedExamples, first_fit, pack
from mlm_jax.errors import DataError


def example(*tokens: int, trained: int = 1) -> Example:
    """The last `trained` tokens are trained."""
    ids = np.array(tokens, np.int32)
    return Example(ids, np.arange(len(ids)) >= len(ids) - trained)


def naive_first_fit(lengths, capacity):
    bins, rooms = [], []
    for item, length in enumerate(lengths):
        fits = next((b for b, room in enumerate(rooms) if room >= length), None)
        if fits is None:
            fits = len(bins)
            bins.append([])
            rooms.append(capacity)
        bins[fits].append(item)
        rooms[fits] -= length
    return bins


@pytest.mark.smoke
@given(st.lists(st.integers(0, 12), max_size=60), st.integers(12, 30))
def test_first_fit_is_the_naive_one(lengths, capacity):
    got = first_fit(lengths, capacity)
    assert [bin.tolist() for bin in got] == naive_first_fit(lengths, capacity)


def test_first_fit_by_hand():
    assert [bin.tolist() for bin in first_fit([6, 5, 4, 5, 10, 1], 10)] == [
        [0, 2],
        [1, 3],
        [4],
        [5],
    ]
    assert first_fit([], 10) == []
    assert [bin.tolist() for bin in first_fit([10], 10)] == [[0]]


def test_first_fit_is_fast_where_bins_stay_open():
    """The naive one would look at 10^9 bins."""
    lengths = [6] * 40_000 + [5] * 40_000
    begun = time.perf_counter()
    assert len(first_fit(lengths, 10)) == 60_000
    assert time.perf_counter() - begun < 20


def test_a_row_by_hand():
    row = pack([example(1, 2, 3, 4, trained=2), example(5, 6)], 6, pad_id=9)
    assert {name: x.tolist() for name, x in row.items()} == {
        "tokens": [1, 2, 3, 5, 9, 9], "targets": [2, 3, 4, 6, 9, 9], "weights": [0, 1, 1, 1, 0, 0],
        "segments": [0, 0, 0, 1, 2, 2], "positions": [0, 1, 2, 0, 0, 1],
    }  # fmt: skip
    assert {x.dtype.name for x in row.values()} == {"int32", "float32"}
    assert row["weights"].dtype == np.float32


def test_the_first_token_is_never_predicted():
    whole = example(1, 2, 3, trained=3)
    row = pack([whole, whole], 4)
    assert row["targets"].tolist() == [2, 3, 2, 3]
    assert row["weights"].tolist() == [1, 1, 1, 1]


@given(
    st.lists(st.integers(2, 20), min_size=1, max_size=40), st.integers(1, 12),
    st.sampled_from([None, 0, 1]),
)  # fmt: skip
def test_every_example_is_in_one_row_once(lengths, seq_len, seed):
    starts = np.cumsum(lengths) - lengths + 1  # no two examples share a token
    examples = [example(*range(a, a + n), trained=n) for a, n in zip(starts, lengths, strict=True)]
    packed = PackedExamples(examples, seq_len, seed=seed)
    pairs = []
    for i in range(len(packed)):
        row = packed.row(i)
        real = row["weights"] == 1
        pairs += zip(row["tokens"][real].tolist(), row["targets"][real].tolist(), strict=True)
        assert (row["segments"][~real] > row["segments"][real].max()).all()
    expected = [(t, t + 1) for e in examples for t in e.tokens[:-1][:seq_len].tolist()]
    assert sorted(pairs) == sorted(expected)


def test_the_seed_decides_and_nothing_else():
    examples = [example(*range(n), trained=1) for n in range(2, 30)]
    orders = [PackedExamples(examples, 32, seed=seed).order.tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == list(range(28))
    assert PackedExamples(examples, 32).order.tolist() == list(range(28))
    a, b = (PackedExamples(examples, 32, seed=1) for _ in range(2))
    for i in range(len(a)):
        np.testing.assert_array_equal(a.row(i)["tokens"], b.row(i)["tokens"])


def test_what_is_lost_is_counted_and_said(caplog):
    long, answer_beyond = example(*range(20), trained=18), example(*range(20), trained=2)
    untrained, single = example(1, 2, trained=0), example(1)
    examples = [long, answer_beyond, untrained, single, example(1, 2)]
    with caplog.at_level(logging.WARNING):
        packed = PackedExamples(examples, 8)
    assert len(packed) == 2
    assert "1 of 5 examples lose their end at model.seq_len=8" in caplog.text
    assert "3 of 5 examples are left out" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        PackedExamples([example(1, 2)], 8)
    assert not caplog.records


@pytest.mark.parametrize("examples", [[], [example(1)], [example(1, 2, trained=0)]])
def test_nothing_to_learn_is_refused(examples):
    with pytest.raises(DataError, match=f"of {len(examples)} examples none has a token to learn"):
        PackedExamples(examples, 8)
