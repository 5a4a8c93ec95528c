"""Short examples side by side in one row: first-fit, in the order in which they come."""

import logging
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from mlm_jax.data.objectives.examples import Example
from mlm_jax.data.objectives.windows import Row
from mlm_jax.errors import DataError

log = logging.getLogger(__name__)


class PackedExamples:
    """Rows of seq_len tokens: a pure function of (examples, seed).

    seed: of the order in which examples are packed; None: as they come.
    too_long: what becomes of an example that does not fit into a row by itself; "truncate" keeps
    its beginning.
    n_truncated, n_dropped: how many lost their end, or all. Dropped is also what has nothing left
    to learn: no token is trained, or none behind the first.
    order [n]: the examples that are packed, in that order; bins: those of each row.

    Raises DataError where none is left.
    """

    def __init__(
        self, examples: Sequence[Example], seq_len: int, *, pad_id: int = 0,
        seed: int | None = None, too_long: Literal["truncate", "drop"] = "truncate",
    ):  # fmt: skip
        self.examples, self.seq_len, self.pad_id = examples, seq_len, pad_id
        long = np.array([len(example.tokens) - 1 > seq_len for example in examples], bool)
        keep = np.array([example.trained[1 : seq_len + 1].any() for example in examples], bool)
        if too_long == "drop":
            keep &= ~long
        self.n_dropped, self.n_truncated = int((~keep).sum()), int((keep & long).sum())
        self.order = np.flatnonzero(keep)
        if not len(self.order):
            raise DataError(
                f"of {len(examples)} examples none has a token to learn within {seq_len} tokens;"
                " raise model.seq_len, or look at what is trained"
            )
        self._report()
        if seed is not None:
            np.random.RandomState(seed).shuffle(self.order)
        lengths = [min(len(examples[i].tokens) - 1, seq_len) for i in self.order.tolist()]
        self.bins = [self.order[bin] for bin in first_fit(lengths, seq_len)]

    def __len__(self) -> int:
        return len(self.bins)

    def row(self, i: int) -> Row:
        """Row i, as `pack` makes it."""
        return pack([self.examples[k] for k in self.bins[i]], self.seq_len, self.pad_id)

    def _report(self) -> None:
        n = len(self.examples)
        if self.n_truncated:
            log.warning(
                "%d of %d examples are longer than model.seq_len=%d: they lose their end",
                self.n_truncated, n, self.seq_len,
            )  # fmt: skip
        if self.n_dropped:
            log.warning(
                "%d of %d examples are left out: too long for model.seq_len=%d, or without a token"
                " to learn", self.n_dropped, n, self.seq_len,
            )  # fmt: skip


def pack(examples: Iterable[Example], seq_len: int, pad_id: int = 0) -> Row:
    """Examples side by side, each cut to seq_len + 1 tokens; together they must fit.

    tokens, targets, segments, positions int32 [T]; weights float32 [T], 1 where the target is
    trained. An example of n tokens takes n - 1 places: all but its last are read, all but its first
    predicted, and nothing is predicted from another example. Segments are numbered from 0;
    positions begin at 0 in each. What is left of the row is a segment of its own, without weight.
    """
    tokens, targets, weights, segments, positions = (np.zeros(seq_len, np.int32) for _ in range(5))
    tokens[:], targets[:], begin, segment = pad_id, pad_id, 0, -1
    for segment, (ids, trained) in enumerate(examples):
        n = min(len(ids) - 1, seq_len)
        if (end := begin + n) > seq_len:
            raise DataError(f"examples of {end} tokens do not fit into a row of {seq_len}")
        tokens[begin:end], targets[begin:end] = ids[:n], ids[1 : n + 1]
        weights[begin:end], segments[begin:end] = trained[1 : n + 1], segment
        positions[begin:end] = np.arange(n)
        begin = end
    segments[begin:] = segment + 1
    positions[begin:] = np.arange(seq_len - begin)
    return {
        "tokens": tokens, "targets": targets, "weights": weights.astype(np.float32),
        "segments": segments, "positions": positions,
    }  # fmt: skip


def first_fit(lengths: Sequence[int], capacity: int) -> list[np.ndarray]:
    """Which items share a bin: each goes into the first that has room for it, or into a new one.

    int64 arrays of places in `lengths`, ascending. At most 1.7 times as many bins as are needed
    (Dosa and Sgall 2013). A tree over the bins holds the most room below each node, so that the
    first with enough is found in O(log n).
    """
    n = len(lengths)
    if n and not 0 <= min(lengths) <= max(lengths) <= capacity:
        raise DataError(f"a length of {max(lengths)} does not fit into a bin of {capacity}")
    leaves = 1 << max(n - 1, 0).bit_length()  # never more bins than items
    room = [capacity] * (2 * leaves)  # of node i the children are 2 i and 2 i + 1
    bins: list[list[int]] = []
    for item, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(item)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [np.array(bin) for bin in bins]
