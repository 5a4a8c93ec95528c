"""BERT's two objectives: words that are hidden, and two segments that may have been swapped.

Devlin et al. 2019, with whole words and n-grams, and with the order of segments (Lan et al. 2020)
instead of a second text from elsewhere. Given RandomState((seed + i) % 2**32), sample i is
Megatron-LM's to the number: the order in which random numbers are drawn is theirs.

Source: megatron/core/datasets/bert_dataset.py (core 0.16).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mlm_jax.data.objectives.masked_words import picked_spans, special_tokens
from mlm_jax.data.objectives.windows import Row, padded
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import DataError

SPECIAL_TOKENS = 3  # [CLS] A [SEP] B [SEP]


class BertTokens(NamedTuple):
    """Ids of the special tokens, and how many ids there are to replace a word by."""

    cls: int
    sep: int
    mask: int
    pad: int
    vocab_size: int


class SentencePair(NamedTuple):
    """[CLS] A [SEP] B [SEP]: tokens, types int32 [n], types 0 up to the first [SEP], then 1."""

    tokens: np.ndarray
    types: np.ndarray
    swapped: bool


def bert_tokens(tokenizer: Tokenizer) -> BertTokens:
    """Raises DataError with the roles for which the tokenizer names no token."""
    roles = ("cls", "sep", "mask", "pad")
    cls, sep, mask, pad = special_tokens(tokenizer, *roles, needed_by="BERT")
    return BertTokens(cls, sep, mask, pad, tokenizer.vocab_size)


def bert_row(
    sentences: Sequence[np.ndarray], rng: np.random.RandomState, *, ids: BertTokens,
    continues: np.ndarray, seq_len: int, target_length: int | None = None, rate: float = 0.15,
    sentence_order: bool = True,
) -> Row:  # fmt: skip
    """A sample of consecutive sentences int [n], as BERT reads it.

    continues, rate: see picked_spans, of up to 3 words. target_length: tokens of both segments, at
    most and by default seq_len - 3.

    tokens, targets, types int32 [T]; weights float32 [T], 1 where predicted; mask bool [T], False
    is padding; swapped int32 []: whether the second segment comes first.
    """
    longest = seq_len - SPECIAL_TOKENS
    target_length = longest if target_length is None else target_length
    if not 1 <= target_length <= longest:
        raise DataError(f"target_length={target_length} does not fit {seq_len=}; try {longest}")
    pair = sentence_pair(sentences, rng, ids, target_length, sentence_order=sentence_order)
    limits = {"target_length": target_length, "rate": rate, "max_ngram": 3}
    spans = picked_spans(pair.tokens, continues, rng, **limits, special=(ids.cls, ids.sep))
    tokens, predicted = mask_words(pair.tokens, spans, rng, ids)
    return {
        "tokens": padded(tokens, seq_len, ids.pad),
        "targets": padded(np.where(predicted, pair.tokens, 0), seq_len),
        "weights": padded(predicted, seq_len).astype(np.float32),
        "types": padded(pair.types, seq_len),
        "mask": np.arange(seq_len) < len(tokens),
        "swapped": np.array(pair.swapped, np.int32),
    }


def sentence_pair(
    sentences: Sequence[np.ndarray], rng: np.random.RandomState, ids: BertTokens,
    target_length: int, *, sentence_order: bool = True,
) -> SentencePair:  # fmt: skip
    """Sentences cut into two segments at random, swapped half of the time, and shortened to fit.

    While both are too long together, the longer loses a token at either end, at random.
    sentence_order False: one segment, [CLS] A [SEP].
    """
    if sentence_order and len(sentences) < 2:
        raise DataError(f"a sample of {len(sentences)} sentence has no order; it needs 2 or more")
    pivot, swapped = len(sentences), False
    if sentence_order:
        pivot = int(rng.randint(1, len(sentences))) if len(sentences) >= 3 else 1
        swapped = bool(rng.random_sample() < 0.5)
    a, b = (
        [t for s in part for t in s.tolist()] for part in (sentences[:pivot], sentences[pivot:])
    )
    if swapped:
        a, b = b, a
    while len(a) + len(b) > target_length:
        longer = a if len(a) > len(b) else b
        longer.pop(0 if rng.random_sample() < 0.5 else -1)
    second = [*b, ids.sep] if b else []
    types = [0] * (len(a) + 2) + [1] * len(second)
    tokens = [ids.cls, *a, ids.sep, *second]
    return SentencePair(np.array(tokens, np.int32), np.array(types, np.int32), swapped)


def mask_words(
    tokens: np.ndarray, spans: Iterable[list[int]], rng: np.random.RandomState, ids: BertTokens
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [n] with these places hidden, bool [n]: which are to be predicted).

    Of these, 80 % become the mask, 10 % any token, and 10 % stay as they are.
    """
    hidden, predicted = np.array(tokens, np.int32), np.zeros(len(tokens), bool)
    for span in spans:
        predicted[span] = True
        for place in span:
            if rng.random_sample() < 0.8:
                hidden[place] = ids.mask
            elif rng.random_sample() >= 0.5:
                hidden[place] = rng.randint(0, ids.vocab_size)
    return hidden, predicted
