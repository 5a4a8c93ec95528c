"""Which sample of a blend is from which of its datasets: Megatron-LM's order, exactly.

Sample i is from the dataset d that is furthest behind its share of the samples so far: where
weight[d] * max(i, 1) - taken[d] is largest, the first of them on ties, in float64.

A loop over samples is slow in Python, so the sequence is cut into blocks, and all blocks advance
together, a sample each at a time. A block does not know what was taken before it, and need not:
whoever is behind is taken next, so that a start a little earlier from a guess soon meets the true
course. Whether it did is seen from where the block before it ends; if not, it runs again from
there. So the result does not rest on the guess, only the time does.

Source: megatron/core/datasets/helpers.cpp and blended_megatron_dataset_builder.py (core 0.16 and
0.20).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlm_jax.errors import DataError

SURPLUS = 0.005  # share of samples that a dataset has ready beyond those its weight asks for
CELLS = 2**15  # blocks times datasets: few enough for the processor's cache, and many at a time
RECORDED_AT_ONCE = 32  # steps


class BlendIndex(NamedTuple):
    """dataset   int16 [N]    which one sample i is from
    sample    int64 [N]    which of that one's samples it is: 0, 1, 2, ...
    """

    dataset: np.ndarray
    sample: np.ndarray


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights that add up to 1, rounded as Megatron-LM's are."""
    return (np.array(weights, np.float64) / np.sum(np.array(weights, np.float64))).tolist()


def samples_per_dataset(weights: Sequence[float], size: int, surplus: float = SURPLUS) -> list[int]:
    """How many samples each dataset has ready for `size` of all; weights add up to 1."""
    require_normalised(weights)
    return [math.ceil(math.ceil(size * weight) * (1 + surplus)) for weight in weights]


def blend_index(weights: Sequence[float], size: int) -> BlendIndex:
    """The order by weights, which add up to 1. That of fewer samples is its beginning."""
    require_normalised(weights)
    return greedy(np.array(weights, np.float64), size)


def exhaustive_index(sizes: Sequence[int]) -> BlendIndex:
    """The order that takes all `sizes[d]` samples of each dataset d, in proportion to them."""
    if not len(sizes) or min(sizes) < 1:
        raise DataError(f"{list(sizes)} samples of each dataset; every one needs 1 or more")
    total = sum(sizes)
    return greedy(np.array(sizes) / float(total), total, np.array(sizes, np.float64))


def require_normalised(weights: Sequence[float]) -> None:
    if not (min(weights, default=-1) >= 0 and np.isclose(sum(weights), 1.0)):
        raise DataError(f"weights {list(weights)}; give numbers >= 0 that add up to 1")


def greedy(weights: np.ndarray, size: int, limits: np.ndarray | None = None) -> BlendIndex:
    """The rule above; limits float64 [D] are the most that may be taken of each dataset."""
    D = len(weights)
    warm_up = 64 + 8 * D  # samples after which a guess is usually forgotten
    length = max(-(-size * D // CELLS), 4 * warm_up)
    begins = np.arange(0, size, length, dtype=np.float64)
    dataset = np.empty((len(begins), length), np.int16)
    sample = np.empty((len(begins), length), np.int64)

    earlier = np.maximum(begins - warm_up, 0)
    starts = guess(weights, earlier)
    for _ in advance(weights, starts, earlier, warm_up, limits):
        pass  # what comes before a block is recorded in the one before it
    starts[:1] = 0
    ends, unsure = starts.copy(), np.arange(len(begins))
    while len(unsure):
        state = starts[unsure]
        for k, taken_from, number in advance(weights, state, begins[unsure], length, limits):
            dataset[unsure, k : k + len(number)] = taken_from.T
            sample[unsure, k : k + len(number)] = number.T
        ends[unsure] = state
        unsure = np.flatnonzero(np.any(starts[1:] != ends[:-1], axis=1)) + 1
        starts[unsure] = ends[unsure - 1]
    return BlendIndex(dataset.reshape(-1)[:size], sample.reshape(-1)[:size])


def guess(weights: np.ndarray, i: np.ndarray) -> np.ndarray:
    """float64 [blocks, D]: perhaps taken before sample i [blocks].

    Rather too few of each, which is made up for at once, and the rest of those that are taken
    often, where too many are soon made up for as well.
    """
    taken = np.maximum(np.floor(i[:, None] * weights) - 1, 0)
    rest = i - taken.sum(axis=1)
    often = np.cumsum(np.where(weights * len(weights) >= 0.5, weights, 0))
    return taken + np.diff(np.round(rest[:, None] * (often / often[-1])), axis=1, prepend=0)


def advance(
    weights: np.ndarray, taken: np.ndarray, i: np.ndarray, steps: int, limits: np.ndarray | None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Runs all blocks on from sample i [blocks], and changes taken [blocks, D] as they go.

    Yields (step, dataset [some, blocks], sample [some, blocks]) for some steps at a time.
    """
    assert taken.flags.c_contiguous  # or flat would be a copy
    flat, behind, row = taken.reshape(-1), np.empty_like(taken), np.arange(len(i)) * len(weights)
    # Written out for each dataset, since numpy is slow where it has to repeat short rows.
    more: Any = np.minimum(i, 1)[:, None]  # who begins at 0 has max(i, 1) = 1 twice
    i = np.repeat(np.maximum(i, 1), len(weights)).reshape(taken.shape)
    weights = np.tile(weights, (len(i), 1))
    for begin in range(0, steps, RECORDED_AT_ONCE):
        some = min(RECORDED_AT_ONCE, steps - begin)
        datasets, numbers = np.empty((some, len(i)), np.intp), np.empty((some, len(i)))
        for dataset, number in zip(datasets, numbers, strict=True):
            np.multiply(i, weights, out=behind)
            np.subtract(behind, taken, out=behind)
            if limits is not None:
                behind[taken >= limits] = -np.inf
            behind.argmax(axis=1, out=dataset)
            at = dataset + row
            np.take(flat, at, out=number)
            flat[at] = number + 1
            i += more
            more = 1
        yield begin, datasets, numbers
