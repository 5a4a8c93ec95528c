"""Which sentences make a sample of BERT's, and an epoch of them.

Megatron-LM's `build_mapping` to the number, of the first epoch with the seed of the run: each
document is cut, sentence after sentence, into samples of some length. What differs is that all
epochs have these samples, each in an order and with hidden words of its own, so that no sample
depends on how many are asked for.

Source: megatron/core/datasets/helpers.cpp, build_mapping_impl (core 0.16).
"""

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.objectives.bert_masking import BertTokens, bert_row
from mlm_jax.data.objectives.windows import Row

SHORT_ONE_IN = 10  # samples: these have any length, so that short texts are seen too
LONGEST_SENTENCE = 512  # tokens: a document with a longer one is left out
DRAWN_AT_ONCE = 2**16


def sample_index(
    lengths: np.ndarray, documents: np.ndarray, *, longest: int, fewest: int, seed: int
) -> np.ndarray:
    """int64 [N, 3]: the first sentence of each sample, the one behind its last, and its length.

    lengths [S]: tokens of the sentences; documents [D + 1]: where each begins in them. A sample
    ends where it has that many tokens, at most `longest`, and `fewest` sentences, unless that would
    leave one alone; it may be longer, and is shortened then (bert_masking).
    """
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    long = np.concatenate([[0], np.cumsum(lengths > LONGEST_SENTENCE)])[documents]
    sizes = np.diff(documents)
    usable = (sizes >= fewest) & ((np.diff(long) == 0) | (sizes == 1))
    drawn, found = target_lengths(longest, seed), []
    for d in np.flatnonzero(usable).tolist():
        first, last = int(documents[d]), int(documents[d + 1])
        while first < last:
            target = next(drawn)
            end = bisect_left(ends, ends[first] + target, first + fewest, last)
            if end >= last - 1:
                end = last
            found.append((first, end, target))
            first = end
        next(drawn)  # theirs draws for a sample more
    return np.array(found, np.int64).reshape(-1, 3)


def target_lengths(longest: int, seed: int) -> Iterator[int]:
    rng = np.random.RandomState(seed)
    while True:
        raw = rng.randint(0, 2**32, DRAWN_AT_ONCE, np.uint32)
        short = raw % SHORT_ONE_IN == 0
        yield from np.where(short, 2 + raw % (longest - 1), longest).tolist()


class BertRows:
    """An epoch of samples in the order of a seed: rows that a bert of these settings reads."""

    def __init__(
        self, indexed: IndexedDataset, samples: np.ndarray, *, ids: BertTokens,
        continues: np.ndarray, seq_len: int, token_types: int, sentence_order: bool, seed: int,
    ):  # fmt: skip
        self.indexed, self.samples, self.seed = indexed, samples, seed
        self.order = np.random.RandomState(seed).permutation(len(samples))
        self.settings = {
            "ids": ids, "continues": continues, "seq_len": seq_len,
            "sentence_order": sentence_order,
        }  # fmt: skip
        unread = {"types": not token_types, "swapped": not sentence_order}
        self.dropped = [name for name, is_dropped in unread.items() if is_dropped]

    def __len__(self) -> int:
        return len(self.samples)

    def row(self, i: int) -> Row:
        """As bert_masking.bert_row; segments int32 [T]: 1, of padding 0, take the place of mask."""
        first, end, target_length = self.samples[self.order[i]].tolist()
        rng = np.random.RandomState((self.seed + i) % 2**32)  # as in Megatron-LM
        sentences = [self.indexed.tokens(k) for k in range(first, end)]
        row = bert_row(sentences, rng, target_length=target_length, **self.settings)
        row["segments"] = row.pop("mask").astype(np.int32)
        return {name: x for name, x in row.items() if name not in self.dropped}
