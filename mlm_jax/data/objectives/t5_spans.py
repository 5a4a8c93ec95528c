"""T5's objective: spans of a text are taken out, and written down behind the name of each place.

    text      Thank you for inviting me to your party last week
    encoder   Thank you <0> me to your party <1> week
    decoder   <bos> <0> for inviting <1> last
    targets   <0> for inviting <1> last <eos>

Raffel et al. 2020, section 3.1.4. Two ways to draw the spans: the paper's, and Megatron-LM's, whose
sample i is the same to the number given RandomState((seed + i) % 2**32).

Source of the second: megatron/core/datasets/t5_dataset.py (core 0.16).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlm_jax.data.objectives.masked_words import picked_spans, special_tokens
from mlm_jax.data.objectives.windows import Row, padded
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
    eos, pad = special_tokens(tokenizer, "eos", "pad", needed_by="T5")
    sentinels: list[int] = []
    while (id := tokenizer.id_of(SENTINEL.format(len(sentinels)))) is not None:
        sentinels.append(id)
    if not sentinels:
        raise DataError(f"the tokenizer lacks {SENTINEL.format(0)} and so on, which T5 needs")
    return T5Tokens(sentinels, tokenizer.special.get("bos", pad), eos, pad)


class Marks(NamedTuple):
    """Ids: start is what a decoder reads first; eos ends what is read, and what is written."""

    start: int
    eos: int
    pad: int


def marks_of(tokenizer: Tokenizer) -> Marks:
    """start is bos, else pad, as T5's own has it, else eos. Raises DataError without an eos."""
    special = tokenizer.special
    eos = special.get("eos", tokenizer.eod_id)
    if eos is None:
        [eos] = special_tokens(tokenizer, "eos", needed_by="a model with an encoder and a decoder")
    pad = special.get("pad", eos)
    return Marks(special.get("bos", pad), eos, pad)


def noise_spans(
    n: int, rng: np.random.RandomState, *, density: float = 0.15, mean_length: float = 3.0
) -> list[Span]:
    """The paper's spans of n >= 2 tokens: density * n tokens in spans of this length on average.

    Both numbers are exact (rounded); what is drawn are the lengths of spans and of what is between.
    """
    if n < 2:
        raise DataError(f"{n} token cannot have a span and something beside it; give 2 or more")
    noise, count = noise_of(n, density, mean_length)
    kept, taken = (_composition(total, count, rng) for total in (n - noise, noise))
    ends = np.cumsum(kept + taken)
    return list(zip((ends - taken).tolist(), ends.tolist(), strict=True))


def noise_of(n: int, density: float = 0.15, mean_length: float = 3.0) -> tuple[int, int]:
    """How many of n tokens are taken out, and in how many spans."""
    noise = min(max(round(n * density), 1), n - 1)
    return noise, min(max(round(noise / mean_length), 1), noise, n - noise)


def spans_within(encoder_length: int, decoder_length: int) -> tuple[int, int]:
    """The most tokens of a text of which both sides hold theirs (0: none), and its spans."""
    for n in range(2 * encoder_length + 2, 1, -1):
        noise, count = noise_of(n)
        if n - noise + count <= encoder_length and noise + count + 1 <= decoder_length:
            return n, count
    return 0, 0


def _composition(total: int, parts: int, rng: np.random.RandomState) -> np.ndarray:
    """`parts` lengths >= 1 that sum to total, every way equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def ngram_spans(
    tokens: np.ndarray, rng: np.random.RandomState, *, continues: np.ndarray, target_length: int,
    rate: float = 0.15,
) -> list[Span]:  # fmt: skip
    """Megatron-LM's spans: up to 10 whole words, which may touch each other. See picked_spans."""
    limits = {"target_length": target_length, "rate": rate, "max_ngram": 10, "geometric": True}
    picked = picked_spans(tokens, continues, rng, **limits)
    return sorted((span[0], span[-1] + 1) for span in picked)


def t5_row(
    tokens: np.ndarray, spans: Sequence[Span], *, ids: T5Tokens, encoder_length: int,
    decoder_length: int,
) -> Row:  # fmt: skip
    """What encoder and decoder read, and the targets, when these spans are taken out of [n] tokens.

    tokens int32 [S], mask bool [S], False is padding: of the encoder; decoder_tokens, targets
    int32 [T] and weights float32 [T], 0 = padding: of the decoder.
    Raises DataError where there are not enough sentinels, or one side does not fit its length.
    """
    if len(spans) > len(ids.sentinels):
        raise DataError(
            f"{len(spans)} spans need as many sentinels, the tokenizer has {len(ids.sentinels)};"
            f" make spans longer or samples shorter, or add {SENTINEL.format(len(spans) - 1)}"
        )
    text, begin = tokens.tolist(), 0
    read: list[int] = []
    written: list[int] = []
    for sentinel, (first, end) in zip(ids.sentinels, spans, strict=False):
        read += [*text[begin:first], sentinel]
        written += [sentinel, *text[first:end]]
        begin = end
    read += text[begin:]
    for name, length, n in (
        ("encoder_length", encoder_length, len(read)),
        ("decoder_length", decoder_length, len(written) + 1),
    ):
        if n > length:
            raise DataError(f"{name}={length} does not hold the {n} tokens of a sample; try {n}")
    return {
        "tokens": padded(read, encoder_length, ids.pad),
        "mask": np.arange(encoder_length) < len(read),
        "decoder_tokens": padded([ids.bos, *written], decoder_length, ids.pad),
        "targets": padded([*written, ids.eos], decoder_length),
        "weights": (np.arange(decoder_length) <= len(written)).astype(np.float32),
    }
