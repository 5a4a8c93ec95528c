"""What BERT and T5 share: which words of a text are to be predicted, and special tokens by role.

Source: megatron/core/datasets/masked_dataset.py (core 0.16); random numbers are drawn in its order.
"""

from collections.abc import Collection, Iterator
from itertools import chain

import numpy as np

from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import DataError

GEOMETRIC_P = 0.2  # of SpanBERT (Joshi et al. 2020, section 3.1)
Words = list[list[int]]  # places of the tokens of each word


def special_tokens(tokenizer: Tokenizer, *roles: str, needed_by: str) -> list[int]:
    """Their ids. Raises DataError with the roles for which the tokenizer names no token."""
    if lacking := [role for role in roles if role not in tokenizer.special]:
        raise DataError(
            f"the tokenizer names no token for {', '.join(lacking)}, which {needed_by} needs; set"
            f" '{lacking[0]}_token' in tokenizer_config.json"
        )
    return [tokenizer.special[role] for role in roles]


def picked_spans(
    tokens: np.ndarray, continues: np.ndarray, rng: np.random.RandomState, *, target_length: int,
    rate: float, max_ngram: int, geometric: bool = False, special: Collection[int] = (),
) -> Iterator[list[int]]:  # fmt: skip
    """Places of one to max_ngram consecutive words after another, of tokens int [n].

    continues bool [V]: whether an id goes on with the word before it (Tokenizer.continues_word).
    rate: share of the tokens that are picked, at least one and at most rate * target_length.
    n words have probability in proportion to 1 / n; geometric: to 0.8^n. Where n words are too
    many, fewer are taken; where one of them is taken already, none is.
    """
    words = whole_words(tokens, continues, special)
    budget = min(rate * target_length, max(1, round(len(tokens) * rate)))
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


def whole_words(tokens: np.ndarray, continues: np.ndarray, special: Collection[int] = ()) -> Words:
    """The places of each word's tokens, in order; special tokens belong to none.

    As in Megatron-LM, the rest of a word that was cut off at the beginning of BERT's second segment
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
