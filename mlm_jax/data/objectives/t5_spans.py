"""T5's objective: spans of a text are taken out, and written down behind the name of each place.

    text      Thank you for inviting me to your party last week
    encoder   Thank you <0> me to your party <1> week
    decoder   <bos> <0> for inviting <1> last
    targets   <0> for inviting <1> last <eos>

Raffel et al. 2020, section 3.1.4. Two ways to draw the spans: the paper's, and Megatron-LM's, whose
sample i is the same to the number given RandomState((seed + i) % 2**32).

Source of the second: megatron/core/datasets/t5_dataset.py (core 0.16).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlm_jax.data.objectives.bert_masking import picked_spans, prediction_budget, whole_words
from mlm_jax.data.objectives.windows import Row
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import DataError

SENTINEL = "<extra_id_{}>"
Span = tuple[int, int]  # begin, end


class T5Tokens(NamedTuple):
    """Ids: sentinels in the order of their use; bos begins the decoder, eos ends the targets."""

    sentinels: Sequence[int]
    bos: int
    eos: int
    pad: int


def t5_tokens(tokenizer: Tokenizer) -> T5Tokens:
    """By their names. Where there is no bos, the decoder begins with pad, as T5's own does.

    Raises DataError with what the tokenizer lacks.
    """
    ids = map(tokenizer.id_of, map(SENTINEL.format, itertools.count()))
    sentinels = [id for id in itertools.takewhile(lambda id: id is not None, ids) if id is not None]
    special = tokenizer.special
    lacking = [role for role in ("eos", "pad") if role not in special]
    if lacking or not sentinels:
        names = [f"a token named as {role}" for role in lacking]
        names += [] if sentinels else [f"sentinels {SENTINEL.format(0)}, {SENTINEL.format(1)}, ..."]
        raise DataError(f"the tokenizer lacks {' and '.join(names)}, which T5 needs")
    return T5Tokens(sentinels, special.get("bos", special["pad"]), special["eos"], special["pad"])


def noise_spans(
    n: int, rng: np.random.RandomState, *, density: float = 0.15, mean_length: float = 3.0
) -> list[Span]:
    """The paper's spans of n >= 2 tokens: density * n tokens in spans of this length on average.

    Both numbers are exact (rounded); what is drawn are the lengths of spans and of what is between.
    """
    if n < 2:
        raise DataError(f"{n} token cannot have a span and something beside it; give 2 or more")
    noise = min(max(round(n * density), 1), n - 1)
    count = min(max(round(noise / mean_length), 1), noise, n - noise)
    kept, taken = (_composition(total, count, rng) for total in (n - noise, noise))
    ends = np.cumsum(kept + taken)
    return list(zip((ends - taken).tolist(), ends.tolist(), strict=True))


def _composition(total: int, parts: int, rng: np.random.RandomState) -> np.ndarray:
    """`parts` lengths >= 1 that sum to total, every way equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def ngram_spans(
    tokens: np.ndarray, rng: np.random.RandomState, *, continues: np.ndarray, target_length: int,
    rate: float = 0.15, max_ngram: int = 10, geometric: bool = True,
) -> list[Span]:  # fmt: skip
    """Megatron-LM's spans: n-grams of whole words, which may touch each other.

    continues bool [V]: whether an id goes on with the word before it. target_length: what samples
    are built for; no more than rate * target_length tokens are taken.
    """
    words, budget = (
        whole_words(tokens, continues),
        prediction_budget(len(tokens), target_length, rate),
    )
    picked = picked_spans(words, budget, rng, max_ngram=max_ngram, geometric=geometric)
    return sorted((span[0], span[-1] + 1) for span in picked)


def t5_row(
    tokens: np.ndarray, spans: Sequence[Span], *, ids: T5Tokens, encoder_length: int,
    decoder_length: int, last_sentinel: bool = False,
) -> Row:  # fmt: skip
    """What encoder and decoder read, and the targets, when these spans are taken out of [n] tokens.

    last_sentinel: the targets end with one more sentinel before eos, as in the paper.

    tokens int32 [S], mask bool [S], False is padding: of the encoder; decoder_tokens, targets
    int32 [T] and weights float32 [T], 0 = padding: of the decoder.
    Raises DataError where there are not enough sentinels, or one side does not fit its length.
    """
    if (needed := len(spans) + last_sentinel) > len(ids.sentinels):
        raise DataError(
            f"{needed} spans need as many sentinels, the tokenizer has {len(ids.sentinels)};"
            f" make spans longer or samples shorter, or add {SENTINEL.format(needed - 1)}"
        )
    tokens = np.asarray(tokens, np.int32)
    encoder: list[np.ndarray | list[int]] = []
    targets: list[np.ndarray | list[int]] = []
    begin = 0
    for sentinel, (first, end) in zip(ids.sentinels, spans, strict=False):
        encoder += [tokens[begin:first], [sentinel]]
        targets += [[sentinel], tokens[first:end]]
        begin = end
    encoder.append(tokens[begin:])
    targets.append([ids.sentinels[len(spans)]] if last_sentinel else [])
    read, written = (np.concatenate(parts).astype(np.int32) for parts in (encoder, targets))
    for name, length, n in (
        ("encoder_length", encoder_length, len(read)),
        ("decoder_length", decoder_length, len(written) + 1),
    ):
        if n > length:
            raise DataError(f"{name}={length} does not hold the {n} tokens of a sample; try {n}")

    def filled(values: np.ndarray | list[int], length: int, padding: int = ids.pad) -> np.ndarray:
        return np.pad(values, (0, length - len(values)), constant_values=padding)

    return {
        "tokens": filled(read, encoder_length),
        "mask": np.arange(encoder_length) < len(read),
        "decoder_tokens": filled(np.append(np.int32(ids.bos), written), decoder_length),
        "targets": filled(np.append(written, np.int32(ids.eos)), decoder_length, 0),
        "weights": (np.arange(decoder_length) <= len(written)).astype(np.float32),
    }
