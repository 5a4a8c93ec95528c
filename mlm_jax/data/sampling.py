"""Which tokens make sample i: Megatron-LM's GPT index, exactly.

The sequences of a split are repeated for as many epochs as the samples take, shuffled, and laid
end to end. Sample k of that stream is its tokens k * seq_len up to and with (k + 1) * seq_len, so
neighbours share one token: the last target of one is the first input of the next. The samples are
then shuffled themselves.

Source: megatron/core/datasets/gpt_dataset.py and helpers.cpp (core 0.16 and 0.20).
"""

import functools
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlm_jax.data.index_cache import cached
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.errors import DataError

# Of the last epoch's samples, fewer than this share are asked for: then it is shuffled by itself,
# or a large part of the data would be seen once less than the rest, at random places.
SEPARATE_BELOW = 0.80


class GptSamples:
    """Every sample of a split, in the order of training; sample i is int32 [seq_len + 1].

    As many samples as whole epochs hold: at least n_samples, or one epoch if that is None.
    Its tokens [:-1] are the input and [1:] the targets. No sample is padded or partial.

    cache is a folder for indices, which all processes may share. Pickled are the arguments, not
    the index.

    Raises DataError where the split cannot give one sample, or the file holds no token ids.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        sequences: range,
        *,
        n_samples: int | None,
        seq_len: int,
        seed: int,
        cache: Path | None = None,
    ):
        if indexed.dtype.kind not in "iu":
            raise DataError(f"{indexed.prefix}.bin: {indexed.dtype.name} values are not token ids")
        self.indexed, self.sequences, self.cache = indexed, sequences, cache
        self._size = {"n_samples": n_samples, "seq_len": seq_len, "seed": seed}
        try:
            self.index = GptIndex(**cached(cache, self._key() if cache else {}, self._build))
        except DataError as error:
            raise DataError(f"{indexed.prefix}: {error}") from None

    def __len__(self) -> int:
        return len(self.index.shuffle)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.concatenate(self.pieces(i), dtype=np.int32)

    def __reduce__(self):
        again = functools.partial(GptSamples, cache=self.cache, **self._size)
        return again, (self.indexed, self.sequences)

    def pieces(self, i: int) -> list[np.ndarray]:
        """Sample i as the stretches of documents it is made of; nothing else is read."""
        k = int(self.index.shuffle[i])
        (first, begin), (last, end) = self.index.sample[k : k + 2].tolist()
        sequences = self.index.document[first : last + 1].tolist()
        if first == last:
            return [self.indexed.tokens(sequences[0], begin, end + 1 - begin)]
        head = self.indexed.tokens(sequences[0], begin)
        tail = self.indexed.tokens(sequences[-1], 0, end + 1)
        return [head, *map(self.indexed.tokens, sequences[1:-1]), tail]

    def _build(self) -> dict[str, np.ndarray]:
        return build_index(self.indexed.lengths, self.sequences, **self._size)._asdict()

    def _key(self) -> dict[str, Any]:
        split = [self.sequences.start, self.sequences.stop]
        data = self.indexed.fingerprint()
        return {"index": "GPT, 1", **self._size, "sequences": split, "data": data}


class GptIndex(NamedTuple):
    """E epochs of S sequences, cut into N samples.

    document   int32 [E * S]         a sequence of the file
    sample     int32 [N + 1, 2]      where each begins: (position in document, token of that
                                     sequence); int64 if int32 could not count the positions
    shuffle    uint32 [N]            a row of sample; int64 if uint32 could not count them
    """

    document: np.ndarray
    sample: np.ndarray
    shuffle: np.ndarray


def split_ranges(split: str, n: int) -> tuple[range, range, range]:
    """The sequences 0..n-1 for training, validation and test, by weights like "969, 30, 1".

    Missing weights are 0. Raises DataError for anything but one to three weights >= 0.
    """
    try:
        weights = [float(weight) for weight in split.replace(",", " ").split()]
    except ValueError:
        weights = []
    total = sum(weights)
    if not (1 <= len(weights) <= 3 and min(weights) >= 0 and 0 < total < math.inf):
        wanted = "one to three weights >= 0, like '969, 30, 1'"
        raise DataError(f"split {split!r} cannot be read; give {wanted}")
    shares = (np.array(weights + [0.0] * (3 - len(weights))) / np.sum(weights)).tolist()
    ends = [round(share * float(n)) for share in itertools.accumulate(shares, initial=0.0)]
    train, valid, test = (range(begin, end) for begin, end in itertools.pairwise(ends))
    return train, valid, test


def build_index(
    lengths: np.ndarray, sequences: range, *, n_samples: int | None, seq_len: int, seed: int
) -> GptIndex:
    """The index of these sequences of a file whose lengths are int32 [all its sequences].

    Raises DataError where there is no token, or not one whole sample.
    """
    tokens = int(lengths[sequences.start : sequences.stop].sum(dtype=np.int64))  # of one epoch
    if not tokens:
        problem = f"a split of {len(sequences)} sequences with {tokens} tokens gives no sample"
        raise DataError(f"{problem}; change data.split or add documents")
    asked = n_samples or 0
    epochs = max(1, -(-(asked * seq_len + 1) // tokens))  # the fewest that hold them
    n = (epochs * tokens - 1) // seq_len
    if not n:
        problem = f"{tokens} tokens are too few for one sample of {seq_len + 1}"
        raise DataError(f"{problem}; change data.split, model.seq_len or add documents")

    before_last = ((epochs - 1) * tokens - 1) // seq_len  # samples that end before the last epoch
    separate = epochs > 1 and is_separate(asked - before_last, (tokens - 1) // seq_len)
    rng = np.random.RandomState(seed)  # its stream and the order of its use are the format
    document = np.tile(np.arange(sequences.start, sequences.stop, dtype=np.int32), epochs)
    shuffle_parts(rng, document, len(document) - separate * len(sequences))
    sample = locate(lengths, document, n, seq_len)
    shuffle = np.arange(n, dtype=np.uint32 if n < np.iinfo(np.uint32).max - 1 else np.int64)
    shuffle_parts(rng, shuffle, before_last if separate else n)
    return GptIndex(document, sample, shuffle)


def is_separate(from_last_epoch: int, of_one_epoch: int) -> bool:
    return from_last_epoch < int(SEPARATE_BELOW * of_one_epoch)


def shuffle_parts(rng: np.random.RandomState, values: np.ndarray, boundary: int) -> None:
    """In place: values[:boundary] among themselves, then values[boundary:] among themselves."""
    rng.shuffle(values[:boundary])
    rng.shuffle(values[boundary:])


LOCATED_AT_ONCE = 2**18  # sequences: what is computed for them stays in the processor's cache


def locate(lengths: np.ndarray, document: np.ndarray, n: int, seq_len: int) -> np.ndarray:
    """[n + 1, 2]: token k * seq_len of these sequences laid end to end, as (position, token)."""
    small = len(document) <= np.iinfo(np.int32).max
    sample = np.empty((n + 1, 2), np.int32 if small else np.int64)
    begin = done = 0  # tokens and samples before these sequences
    for first in range(0, len(document), LOCATED_AT_ONCE):
        sizes = lengths[document[first : first + LOCATED_AT_ONCE]].astype(np.int64)
        ends = begin + np.cumsum(sizes)
        stop = min(-(-int(ends[-1]) // seq_len), n + 1)  # of the samples that begin in them
        at = seq_len * np.arange(done, stop, dtype=np.int64)
        position = np.searchsorted(ends, at, side="right")  # right: none begins in an empty one
        sample[done:stop, 0] = first + position
        sample[done:stop, 1] = at - (ends - sizes)[position]
        begin, done = int(ends[-1]), stop
    sample[0] = 0  # the first alone may begin in an empty one, as the published walk starts there
    return sample
