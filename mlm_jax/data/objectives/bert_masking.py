"""BERT's two objectives: words that are hidden, and two segments that may have been swapped.

Devlin et al. 2019, with whole words and n-grams, and with the order of segments (Lan et al. 2020)
instead of a second text from elsewhere. Given RandomState((seed + i) % 2**32), sample i is
Megatron-LM's to the number: the order in which random numbers are drawn is theirs.

Source: megatron/core/datasets/masked_dataset.py and bert_dataset.py (core 0.16).
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from mlm_jax.data.objectives.windows import Row
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import DataError

SPECIAL_TOKENS = 3  # [CLS] A [SEP] B [SEP]
GEOMETRIC_P = 0.2  # of SpanBERT (Joshi et al. 2020, section 3.1)
Words = list[list[int]]  # places of the tokens of each word


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
    special = tokenizer.special
    if lacking := [role for role in ("cls", "sep", "mask", "pad") if role not in special]:
        raise DataError(
            f"the tokenizer names no token for {', '.join(lacking)}, which BERT needs; give a"
            f" WordPiece vocab.txt, or '{lacking[0]}_token' in tokenizer_config.json"
        )
    cls, sep, mask, pad = (special[role] for role in ("cls", "sep", "mask", "pad"))
    return BertTokens(cls, sep, mask, pad, tokenizer.vocab_size)


def bert_row(
    sentences: Sequence[np.ndarray], rng: np.random.RandomState, *, ids: BertTokens,
    continues: np.ndarray, seq_len: int, target_length: int | None = None, rate: float = 0.15,
    max_ngram: int = 3, sentence_order: bool = True,
) -> Row:  # fmt: skip
    """A sample of consecutive sentences int [n], as BERT reads it.

    continues bool [V]: whether an id goes on with the word before it (Tokenizer.continues_word).
    target_length: tokens of both segments, at most and by default seq_len - 3; rate: share of the
    tokens that are predicted, at least one and at most rate * target_length.

    tokens, targets, types int32 [T]; weights float32 [T], 1 where predicted; mask bool [T], False
    is padding; swapped int32 []: whether the second segment comes first.
    """
    longest = seq_len - SPECIAL_TOKENS
    target_length = longest if target_length is None else target_length
    if not 1 <= target_length <= longest:
        raise DataError(f"target_length={target_length} does not fit {seq_len=}; try {longest}")
    pair = sentence_pair(sentences, rng, ids, target_length, sentence_order=sentence_order)
    words = whole_words(pair.tokens, continues, special=(ids.cls, ids.sep))
    budget = prediction_budget(len(pair.tokens), target_length, rate)
    tokens, predicted = mask_words(pair.tokens, words, budget, rng, ids, max_ngram=max_ngram)
    n = len(tokens)

    def filled(values: np.ndarray, padding: float = 0) -> np.ndarray:
        return np.pad(values, (0, seq_len - n), constant_values=padding)

    return {
        "tokens": filled(tokens, ids.pad),
        "targets": filled(np.where(predicted, pair.tokens, 0).astype(np.int32)),
        "weights": filled(predicted.astype(np.float32)),
        "types": filled(pair.types),
        "mask": filled(np.ones(n, bool)),
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
    none = np.zeros(0, np.int32)
    a, b = (
        np.concatenate([none, *part], dtype=np.int32)
        for part in (sentences[:pivot], sentences[pivot:])
    )
    if swapped:
        a, b = b, a
    while len(a) + len(b) > target_length:
        kept = slice(1, None) if rng.random_sample() < 0.5 else slice(None, -1)
        if len(a) > len(b):
            a = a[kept]
        else:
            b = b[kept]
    ends = [ids.sep] if len(b) else []
    tokens = np.concatenate([[ids.cls], a, [ids.sep], b, ends]).astype(np.int32)
    types = (np.arange(len(tokens)) >= len(a) + 2).astype(np.int32)
    return SentencePair(tokens, types, swapped)


def whole_words(tokens: np.ndarray, continues: np.ndarray, special: Collection[int] = ()) -> Words:
    """The places of each word's tokens, in order; special tokens belong to none.

    As in Megatron-LM, the rest of a word that was cut off at the beginning of the second segment
    counts to the last word of the first.
    """
    words: Words = []
    for place, token in enumerate(tokens.tolist()):
        if token in special:
            continue
        if words and continues[token]:
            words[-1].append(place)
        else:
            words.append([place])
    return words


def prediction_budget(n: int, target_length: int, rate: float) -> float:
    """How many of n tokens may be predicted."""
    return min(rate * target_length, max(1, round(n * rate)))


def mask_words(
    tokens: np.ndarray, words: Words, budget: float, rng: np.random.RandomState,
    ids: BertTokens, *, max_ngram: int = 3,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(tokens int32 [n] with up to `budget` hidden, bool [n]: which are to be predicted).

    Of these, 80 % become the mask, 10 % any token, and 10 % stay as they are.
    """
    hidden, predicted = np.array(tokens, np.int32), np.zeros(len(tokens), bool)
    for span in picked_spans(words, budget, rng, max_ngram=max_ngram):
        predicted[span] = True
        for place in span:
            if rng.random_sample() < 0.8:
                hidden[place] = ids.mask
            elif rng.random_sample() >= 0.5:
                hidden[place] = rng.randint(0, ids.vocab_size)
    return hidden, predicted


def picked_spans(
    words: Words, budget: float, rng: np.random.RandomState, *, max_ngram: int,
    geometric: bool = False,
) -> Iterator[list[int]]:  # fmt: skip
    """Places of one to max_ngram consecutive words after another, at most `budget` in all.

    n words have probability in proportion to 1 / n; geometric: to 0.8^n. Where n words exceed the
    budget, fewer are taken; where one of them is taken already, none is.
    """
    sizes = np.arange(1, max_ngram + 1)
    odds = 1 / sizes / (1 / sizes).sum()
    taken: set[int] = set()
    order = np.arange(len(words))
    rng.shuffle(order)
    for first in order.tolist():
        left = budget - len(taken)
        if left <= 0:
            return
        n = min(rng.geometric(GEOMETRIC_P), max_ngram) if geometric else rng.choice(sizes, p=odds)
        spans = ([*chain(*words[first : first + size])] for size in range(int(n), 0, -1))
        span = next((span for span in spans if len(span) <= left), None)
        if span and taken.isdisjoint(span):
            taken.update(span)
            yield span
