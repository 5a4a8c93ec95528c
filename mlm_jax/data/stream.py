"""Samples over all epochs: sample i depends on seed and data, not on who reads it or when."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from mlm_jax.data.blend_order import BlendIndex, blend_index, exhaustive_index
from mlm_jax.data.index_cache import cached
from mlm_jax.data.objectives.windows import Row


class Rows(Protocol):
    """The samples of one epoch, each a row of a batch: see Batches.batch."""

    def __len__(self) -> int: ...
    def row(self, i: int) -> Row: ...


class Stream(Protocol):
    """n_samples: of an epoch; of what has none, as many as were asked for."""

    n_samples: int

    def row(self, i: int) -> Row: ...
    def is_new(self, i: int) -> bool:
        """Whether sample i is in the first epoch of what it is from."""
        ...


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

    def is_new(self, i: int) -> bool:
        return i < self.n_samples


class Weighted:
    """Streams in fixed proportions, as Megatron-LM mixes them: n_samples in all, then no more."""

    def __init__(
        self, streams: Sequence[Stream], weights: Sequence[float], n_samples: int,
        cache: Path | None = None,
    ):  # fmt: skip
        """weights add up to 1; cache: a folder for the order."""
        key = {"index": "blend, 1", "weights": list(weights), "size": n_samples}
        order = cached(cache, key, lambda: blend_index(weights, n_samples)._asdict())
        self.streams, self.index, self.n_samples = streams, BlendIndex(**order), n_samples

    def row(self, i: int) -> Row:
        return self.streams[self.index.dataset[i]].row(int(self.index.sample[i]))

    def is_new(self, i: int) -> bool:
        return self.streams[self.index.dataset[i]].is_new(int(self.index.sample[i]))

    def repeats(self) -> bool:
        """Whether a stream gives more than its epoch."""
        last = len(self.index.dataset) - 1
        for d, stream in enumerate(self.streams):
            at = last
            while at >= 0 and self.index.dataset[at] != d:
                at -= 1
            if at >= 0 and not stream.is_new(int(self.index.sample[at])):
                return True
        return False


class Exhaustive:
    """Streams in proportion to their sizes: all samples of all of them once an epoch."""

    def __init__(self, streams: Sequence[Stream], cache: Path | None = None):
        sizes = [stream.n_samples for stream in streams]
        key = {"index": "exhaustive blend, 1", "sizes": sizes}
        order = cached(cache, key, lambda: exhaustive_index(sizes)._asdict())
        self.streams, self.index, self.n_samples = streams, BlendIndex(**order), sum(sizes)

    def row(self, i: int) -> Row:
        epoch, within = divmod(i, self.n_samples)
        stream = self.streams[self.index.dataset[within]]
        return stream.row(epoch * stream.n_samples + int(self.index.sample[within]))

    def is_new(self, i: int) -> bool:
        return i < self.n_samples
