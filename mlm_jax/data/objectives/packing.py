"""Short examples side by side in one row: first-fit, in the order in which they come."""

import logging
from collections.abc import Iterable, Sequence

import numpy as np

from mlm_jax.data.objectives.examples import Example
from mlm_jax.data.objectives.windows import Row
from mlm_jax.errors import DataError

log = logging.getLogger(__name__)


class PackedExamples:
    """Rows of seq_len tokens: a pure function of (examples, seed).

    seed: of the order in which examples are packed; None: as they come. An example too long for a
    row loses its end; without a token to learn (the first is never predicted) it is left out.
    order [n]: the examples that are packed, in that order; bins: those of each row.

    Raises DataError where none is left.
    """

    def __init__(
        self, examples: Sequence[Example], seq_len: int, *, pad_id: int = 0, seed: int | None = None
    ):
        self.examples, self.seq_len, self.pad_id = examples, seq_len, pad_id
        keep = [example.trained[1 : seq_len + 1].any() for example in examples]
        self.order, n = np.flatnonzero(keep), len(examples)
        if not len(self.order):
            raise DataError(
                f"of {n} examples none has a token to learn within {seq_len} tokens; raise"
                " model.seq_len, or look at what is trained"
            )
        if seed is not None:
            np.random.RandomState(seed).shuffle(self.order)
        lengths = np.array([len(examples[i].tokens) - 1 for i in self.order.tolist()])
        if long := np.count_nonzero(lengths > seq_len):
            log.warning("%d of %d examples lose their end at model.seq_len=%d", long, n, seq_len)
        if left_out := n - len(self.order):
            log.warning(
                "%d of %d examples are left out: no token to learn within model.seq_len=%d",
                left_out, n, seq_len,
            )  # fmt: skip
        fitting = np.minimum(lengths, seq_len).tolist()
        self.bins = [self.order[bin] for bin in first_fit(fitting, seq_len)]

    def __len__(self) -> int:
        return len(self.bins)

    def row(self, i: int) -> Row:
        """Row i, as `pack` makes it."""
        return pack([self.examples[k] for k in self.bins[i]], self.seq_len, self.pad_id)


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
        end = begin + n
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
    """Which items (lengths 0 to capacity) share a bin: each is in the first that had room for it.

    int64 arrays of places in `lengths`, ascending. At most 1.7 times as many bins as are needed
    (Dosa and Sgall 2013). A tree over the bins holds the most room below each node, so that the
    first with enough is found in O(log n).
    """
    n = len(lengths)
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
