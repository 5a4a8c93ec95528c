"""Causal windows beside Megatron-LM's masks, and prefixes."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm_jax.data.objectives.windows import causal, prefix_lm
from mlm_jax.errors import DataError

EOD = 0
SETTINGS = list(itertools.product([False, True], repeat=3))


@pytest.mark.smoke
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6).filter(lambda n: sum(n) > 1),
    settings=st.sampled_from(SETTINGS),
)
def test_equals_megatron_where_documents_end_with_eod(lengths, settings):
    apart, reset, mask = settings
    pieces = [np.array([*range(1, n), EOD]) for n in lengths]
    pieces[-1] = np.arange(1, lengths[-1] + 1)  # a sample ends within a document
    row = causal(pieces, apart=apart, reset_positions=reset, mask_boundaries=mask)
    tokens = row["tokens"]
    seen, loss_mask, positions = megatron_masks(tokens, reset, apart, mask)
    T = len(tokens)
    segments = row.get("segments", np.zeros(T, np.int32))
    np.testing.assert_array_equal((segments[:, None] == segments) & np.tri(T, dtype=bool), seen)
    np.testing.assert_array_equal(row["weights"], loss_mask)
    np.testing.assert_array_equal(row.get("positions", np.arange(T)), positions)
    np.testing.assert_array_equal(np.append(tokens, row["targets"][-1]), np.concatenate(pieces))


def megatron_masks(tokens, reset_position_ids, reset_attention_mask, eod_mask_loss):
    """What gpt_dataset.py's _get_ltor_masks_and_position_ids computes (core 0.16), in numpy.

    (who sees whom bool [T, T], loss mask [T], position ids [T])
    """
    T = len(tokens)
    seen, loss_mask, positions = np.tri(T, dtype=bool), np.ones(T), np.arange(T)
    ends = np.flatnonzero(tokens == EOD)
    if eod_mask_loss:
        loss_mask[ends] = 0
    before = 0
    for end in ends:
        if reset_attention_mask:
            seen[end + 1 :, : end + 1] = False
        if reset_position_ids:
            positions[end + 1 :] -= end + 1 - before
            before = end + 1
    return seen, loss_mask, positions


def test_a_row_by_hand():
    pieces = [np.array([7, 8], np.uint16), np.array([9]), np.array([5, 6, 7])]
    row = causal(pieces, apart=True, reset_positions=True, mask_boundaries=True)
    assert {name: x.tolist() for name, x in row.items()} == {
        "tokens": [7, 8, 9, 5, 6], "targets": [8, 9, 5, 6, 7], "weights": [1, 0, 0, 1, 1],
        "segments": [0, 0, 1, 2, 2], "positions": [0, 1, 0, 0, 1],
    }  # fmt: skip
    dtypes = {name: x.dtype.name for name, x in row.items()}
    assert dtypes.pop("weights") == "float32"
    assert set(dtypes.values()) == {"int32"}


def test_megatrons_default_is_a_plain_window():
    row = causal(
        [np.arange(3), np.arange(4)], apart=False, reset_positions=False, mask_boundaries=False
    )
    assert row.keys() == {"tokens", "targets", "weights"}
    assert row["weights"].tolist() == [1] * 6


def test_padding_is_never_a_target():
    pieces = [np.arange(4), np.zeros(3, int)]
    row = causal(pieces, apart=False, reset_positions=False, mask_boundaries=False, padding=3)
    assert row["weights"].tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_tokens_are_refused(n):
    with pytest.raises(DataError, match="predicts nothing"):
        causal([np.arange(n)], apart=True, reset_positions=True, mask_boundaries=True)
    with pytest.raises(DataError, match="predicts nothing"):
        prefix_lm(np.arange(n), np.random.RandomState(0))


def test_a_prefix_is_seen_and_the_rest_is_trained():
    row = prefix_lm(np.arange(10, 16), np.random.RandomState(0), prefix_length=3)
    assert row["tokens"].tolist() == [10, 11, 12, 13, 14]
    assert row["prefix"].tolist() == [True, True, True, False, False]
    assert row["weights"].tolist() == [0, 0, 1, 1, 1]  # 12 predicts 13, the first behind the prefix


@given(T=st.integers(1, 30), seed=st.integers(0, 1000))
def test_no_target_of_a_prefix_lm_is_in_sight(T, seed):
    row = prefix_lm(np.arange(T + 1), np.random.RandomState(seed))
    P = row["prefix"].sum()
    assert 1 <= P <= T
    assert row["weights"].sum() == T + 1 - P
    seen = np.tri(T, dtype=bool) | (row["prefix"][:, None] & row["prefix"])
    for t in np.flatnonzero(row["weights"]):
        assert t + 1 == T or not seen[t, t + 1]


def test_prefixes_of_all_lengths_are_drawn():
    rng = np.random.RandomState(0)
    drawn = [prefix_lm(np.arange(6), rng)["prefix"].sum() for _ in range(200)]
    assert set(drawn) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("length", [0, 6, -1])
def test_a_prefix_that_does_not_fit_is_refused(length):
    with pytest.raises(DataError, match=f"prefix_length={length} .* try 1 to 5"):
        prefix_lm(np.arange(6), np.random.RandomState(0), prefix_length=length)
