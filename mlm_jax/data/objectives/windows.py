"""From the tokens of a sample to a row of a batch: what is read, predicted and counted."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from mlm_jax.errors import DataError

Row = dict[str, np.ndarray]  # one sample; rows stacked are a batch


def causal(
    pieces: Sequence[np.ndarray], *, apart: bool, reset_positions: bool, mask_boundaries: bool,
    padding: int = 0,
) -> Row:  # fmt: skip
    """Each token from those before it, over stretches of documents that together have T + 1 tokens.

    tokens, targets int32 [T]; weights float32 [T], 0 = untrained; and
    segments int32 [T]   with apart: a document's tokens share a number (reset_attention_mask)
    positions int32 [T]  with reset_positions: 0, 1, ... in each document (reset_position_ids)
    mask_boundaries      no loss where the first token of a document would be predicted from the
                         last of the one before it (eod_mask_loss)
    padding              how many tokens at the end only fill up: they are never a target

    The names in brackets are Megatron-LM's, whose `_get_ltor_masks_and_position_ids` gives the same
    where each document ends with the EOD and has no other. There a document ends where the EOD id
    is found; here where the file says so, with or without that id.
    """
    tokens = np.concatenate(pieces, dtype=np.int32)
    if len(tokens) < 2:
        raise DataError(f"a sample of {len(tokens)} tokens predicts nothing; it needs 2 or more")
    lengths = np.array([len(piece) for piece in pieces])
    segments = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    weights = np.ones(len(tokens) - 1, np.float32)
    if mask_boundaries:
        weights[segments[1:] != segments[:-1]] = 0
    weights[max(0, len(weights) - padding) :] = 0
    row = {"tokens": tokens[:-1], "targets": tokens[1:], "weights": weights}
    if apart:
        row["segments"] = segments[:-1]
    if reset_positions:
        begins = np.repeat(np.cumsum(lengths) - lengths, lengths)
        row["positions"] = (np.arange(len(tokens)) - begins).astype(np.int32)[:-1]
    return row


def prefix_lm(
    tokens: np.ndarray, rng: np.random.RandomState, *, prefix_length: int | None = None
) -> Row:
    """A prefix that is read in both directions, and the rest predicted from it and from itself.

    tokens [T + 1]; prefix_length: 1 to T tokens; None: drawn evenly from these, as in Raffel et al.
    2020 (T5), section 3.2.1. Gives tokens, targets int32 [T]; weights float32 [T]: 1 for targets
    behind the prefix; prefix bool [T]: tokens that see each other, whichever comes first.
    """
    T = len(tokens) - 1
    if T < 1:
        raise DataError(f"a sample of {len(tokens)} tokens predicts nothing; it needs 2 or more")
    length = int(rng.randint(1, T + 1)) if prefix_length is None else prefix_length
    if not 1 <= length <= T:
        raise DataError(f"prefix_length={length} does not fit {T} tokens of input; try 1 to {T}")
    tokens = np.asarray(tokens, np.int32)
    at = np.arange(T)
    weights = (at + 1 >= length).astype(np.float32)  # token t predicts token t + 1
    return {"tokens": tokens[:-1], "targets": tokens[1:], "weights": weights, "prefix": at < length}


def padded(values: ArrayLike, length: int, padding: int = 0) -> np.ndarray:
    """int32 [length]: values [n], filled up at the end."""
    values = np.asarray(values, np.int32)
    return np.pad(values, (0, length - len(values)), constant_values=padding)
