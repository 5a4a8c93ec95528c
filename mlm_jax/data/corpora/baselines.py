"""Bits per byte that need no network: what a model has to beat."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlm_jax.data.indexed import IndexedDataset


def token_counts(prefix: Path, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: how often each id is in a token file."""
    indexed = IndexedDataset(prefix)
    tokens = np.concatenate([indexed.tokens(i) for i in range(len(indexed))])
    return np.bincount(tokens, minlength=vocab_size)


def unigram_bits(train: np.ndarray, valid: np.ndarray) -> float:
    """Bits of the valid tokens under the train frequencies, each count one higher than seen."""
    return float(valid @ np.log2((train.sum() + len(train)) / (train + 1)))


def xz_baseline(texts: Sequence[str]) -> dict[str, float]:
    try:
        import lzma  # a Python built without liblzma has none
    except ImportError:
        return {}
    data = "".join(texts).encode()
    return {"xz": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)}
