"""Endless sequences of samples: sample i depends on seed and data, not on who reads it or when."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mlm_jax.data.blend_order import BlendIndex, blend_index, exhaustive_index
from mlm_jax.data.index_cache import cached
from mlm_jax.data.objectives.windows import Row


class Rows(Protocol):
    """The samples of one epoch, each a row of a batch: see Batches.batch."""

    def __len__(self) -> int: ...
    def row(self, i: int) -> Row: ...


class Stream(Protocol):
    """n_samples: as many of the first ones hold none twice."""

    n_samples: int

    def row(self, i: int) -> Row: ...


class Epochs:
    """One epoch after the other, each in an order of its own: epoch(e) has its rows.

    Within the first, samples come as in Megatron-LM. There all epochs that a run takes are shuffled
    together, so that the order depends on the steps asked for: make them one epoch for that.
    """

    def __init__(self, epoch: Callable[[int], Rows]):
        self.epoch = functools.lru_cache(maxsize=2)(epoch)  # a batch may lie across two
        self.n_samples = len(self.epoch(0))

    def row(self, i: int) -> Row:
        epoch, within = divmod(i, self.n_samples)
        return self.epoch(epoch).row(within)


class Weighted:
    """Streams in fixed proportions, as Megatron-LM mixes them: the first `size` samples."""

    def __init__(
        self, streams: Sequence[Stream], weights: Sequence[float], size: int,
        cache: Path | None = None,
    ):  # fmt: skip
        """weights add up to 1; cache: a folder for the order."""
        key = {"index": "blend, 1", "weights": list(weights), "size": size}
        order = cached(cache, key, lambda: blend_index(weights, size)._asdict())
        self.streams, self.index = streams, BlendIndex(**order)
        repeats = self.index.sample >= np.array([s.n_samples for s in streams])[self.index.dataset]
        self.n_samples = int(repeats.argmax()) if repeats.any() else size

    def row(self, i: int) -> Row:
        return self.streams[self.index.dataset[i]].row(int(self.index.sample[i]))


class Exhaustive:
    """Streams in proportion to their sizes: all samples of all of them once an epoch."""

    def __init__(self, streams: Sequence[Stream]):
        self.streams = streams
        self.index = exhaustive_index([stream.n_samples for stream in streams])
        self.n_samples = len(self.index.sample)

    def row(self, i: int) -> Row:
        epoch, within = divmod(i, self.n_samples)
        stream = self.streams[self.index.dataset[within]]
        return stream.row(epoch * stream.n_samples + int(self.index.sample[within]))
