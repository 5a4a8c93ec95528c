"""Fill-in-the-middle: a document is cut into prefix, middle and suffix, and the middle comes last.

A causal model so learns to write what goes between two texts (Bavarian et al. 2022). The cuts are
between characters, not tokens: where a person puts the cursor, a token seldom ends.

Source: megatron/training/datasets/fim_dataset.py, whose random numbers are drawn in this order.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import DataError

NAMES = (  # prefix, middle, suffix, pad, as code models call them
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"),  # StarCoder
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>"),  # SantaCoder
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),  # Qwen-Coder
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|endoftext|>"),  # OpenAI's
    ("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "</s>"),  # Codestral
    ("▁<PRE>", "▁<MID>", "▁<SUF>", "</s>"),  # CodeLlama
)
BROKEN = "\ufffd"  # what a character decodes to whose bytes are not all there


class FimTokens(NamedTuple):
    """Ids of the tokens that stand before each part, and of the one that fills a sample up."""

    prefix: int
    middle: int
    suffix: int
    pad: int


@dataclasses.dataclass(frozen=True)
class Fim:
    """rate: share of documents rearranged; spm_rate: share of these with the suffix first."""

    tokenizer: Tokenizer
    tokens: FimTokens
    rate: float = 0.5
    spm_rate: float = 0.5

    def __post_init__(self):
        for name in ("rate", "spm_rate"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise DataError(f"data.fim_{name}={share}; give a share from 0 to 1")


def fim_tokens(tokenizer: Tokenizer, names: str | None = None) -> FimTokens:
    """The ids of 'prefix,middle,suffix,pad'; names None: of the first set in NAMES that is there.

    Raises DataError where the tokenizer lacks one.
    """
    for four in [tuple(map(str.strip, names.split(",")))] if names else NAMES:
        ids = [id for id in map(tokenizer.id_of, four) if id is not None]
        if len(ids) == len(four) == 4:
            return FimTokens(*ids)
    sets = "; ".join(", ".join(known) for known in NAMES)
    raise DataError(
        f"the tokenizer lacks tokens for fill-in-the-middle (data.fim_tokens={names}); name four"
        f" that it has, 'prefix,middle,suffix,pad', or take one with a whole set of these: {sets}"
    )


def fill_in_the_middle(
    pieces: Sequence[np.ndarray], rng: np.random.RandomState, fim: Fim
) -> tuple[list[np.ndarray], int]:
    """A sample's stretches of documents, some rearranged; and how many tokens at the end are pad.

    pieces: int [n] each; the result has as many tokens in all: what the new tokens add is cut off
    at the end, and where fewer are left, a last piece of pad tokens fills up. The EOD stays where a
    stretch has one, and what lies between two is rearranged by itself.

    Megatron-LM's sample is the same where each document ends with the EOD, but for three cases: it
    drops the EOD of an empty document, puts an empty example behind a sample that ends with an EOD,
    and replaces a character whose bytes the sample's edge has cut; such a stretch is kept as it is.
    """
    room, eod = sum(map(len, pieces)), fim.tokenizer.eod_id
    rearranged: list[np.ndarray] = []
    for piece in pieces:
        cuts = [cut for i in np.flatnonzero(piece == eod) for cut in (i, i + 1)]
        parts = [part for part in np.split(np.asarray(piece, np.int32), cuts) if len(part)]
        new = [part if part[0] == eod else _permuted(part, rng, fim) for part in parts]
        if new and room:
            rearranged.append(np.concatenate(new)[:room])
            room -= len(rearranged[-1])
    if room:
        rearranged.append(np.full(room, fim.tokens.pad, np.int32))
    return rearranged, room


def _permuted(tokens: np.ndarray, rng: np.random.RandomState, fim: Fim) -> np.ndarray:
    """Prefix, suffix, middle (PSM); or the suffix first, as the paper's second variant of SPM."""
    if not rng.binomial(1, fim.rate):
        return tokens
    text = fim.tokenizer.decode(tokens)
    if BROKEN in text:
        return tokens
    first, second = sorted(rng.randint(0, len(text) + 1, size=2).tolist())
    prefix, middle, suffix = map(
        fim.tokenizer.encode, (text[:first], text[first:second], text[second:])
    )
    ids = fim.tokens
    if rng.binomial(1, fim.spm_rate):
        order = [ids.prefix, ids.suffix, *suffix, ids.middle, *prefix, *middle]
    else:
        order = [ids.prefix, *prefix, ids.suffix, *suffix, ids.middle, *middle]
    return np.array(order, np.int32)
