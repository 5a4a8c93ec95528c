"""Several datasets as one: which they are and how much of each, as text or in a file.

Source: megatron/core/datasets/utils.py (core 0.16 and 0.20).
"""

import contextlib
import json
import math
import reprlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlm_jax.data import files
from mlm_jax.errors import DataError

SPLITS = ("train", "valid", "test")
MOST = 32766  # datasets: they are counted in int16


@dataclass(frozen=True)
class Blend:
    """Prefixes of .bin and .idx, and how much of each: by weight, or all there is.

    Weights need not add up to 1. Raises DataError with everything that is wrong.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self):
        problems = [*self._wrong_prefixes(), *self._wrong_weights()]
        if problems:
            raise DataError("\n  ".join(["a blend that cannot be:", *problems]))

    def _wrong_prefixes(self) -> Iterator[str]:
        if not 1 <= len(self.prefixes) <= MOST:
            yield f"{len(self.prefixes)} prefixes; give 1 to {MOST}, like '0.7 A 0.3 B' or 'A B'"
        for prefix in dict.fromkeys(self.prefixes):
            if not prefix:
                yield "an empty prefix; give the path of a .bin and .idx without its ending"
            if as_number(prefix) is not None:
                yield f"{prefix} where a prefix is expected; weights go before all or none"
            if (times := self.prefixes.count(prefix)) > 1:
                yield f"{prefix} {times} times; give it once, with the sum of its weights"

    def _wrong_weights(self) -> Iterator[str]:
        if self.weights is None:
            return
        if len(self.weights) != len(self.prefixes):
            yield f"{len(self.weights)} weights for {len(self.prefixes)} prefixes; give one each"
        for weight, prefix in zip(self.weights, self.prefixes, strict=False):
            if not 0 < weight < math.inf:  # also NaN. At 0 it would still be taken from, on ties
                yield f"weight {weight} of {prefix}; give a number above 0, or leave it out"
        if sum(self.weights) == math.inf and max(self.weights) < math.inf:
            yield "weights whose sum is infinite; give smaller ones"


def parse_blend(text: str) -> Blend:
    """'0.7 A 0.3 B' or 'A B'; a path with spaces in quotes. Raises DataError."""
    try:
        return blend_of(shlex.split(text))
    except ValueError as error:
        raise DataError(f"{text!r}: {error}; a path with spaces is written 'in quotes'") from None
    except DataError as error:
        raise DataError(f"{text!r}: {error}") from None


def blend_of(items: Sequence[str]) -> Blend:
    """Weights and prefixes in turn, if there are numbers in all places of weights; or prefixes."""
    weights = [as_number(item) for item in items[::2]]
    if items and len(items) % 2 == 0 and None not in weights:
        return Blend(tuple(items[1::2]), tuple(w for w in weights if w is not None))
    return Blend(tuple(items))


def read_blends(text: str) -> Blend | dict[str, Blend]:
    """A blend from its text or from a file; or one for each split, where a .json file has them.

    .txt     a blend as parse_blend takes it
    .json    a list like [0.7, "A", 0.3, "B"], or {"train": ..., "valid": ..., "test": ...} of
             lists or texts, as Megatron-LM's --per-split-data-args-path; null is no such split

    Raises DataError with the file and every problem.
    """
    if len(text.split()) > 1 or not text.endswith((".txt", ".json")):
        return parse_blend(text)
    try:
        content = files.whole(text).tobytes().decode()
        return of_json(json.loads(content)) if text.endswith(".json") else parse_blend(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{text}: not JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{text}: not UTF-8: {error}") from None
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(text) else f"{text}: {error}") from None


def of_json(content: Any) -> Blend | dict[str, Blend]:
    if not isinstance(content, dict):
        return of_value(content)
    problems = [f"{key!r}; there are {', '.join(SPLITS)}" for key in content if key not in SPLITS]
    blends = {}
    for split in SPLITS:
        if content.get(split) is not None:
            try:
                blends[split] = of_value(content[split])
            except DataError as error:
                problems.append(f"{split}: {error}")
    if problems or not blends:
        raise DataError("\n".join(problems) or f"no split; give {', '.join(SPLITS)}")
    return blends


def of_value(value: Any) -> Blend:
    if isinstance(value, str):
        return parse_blend(value)
    if not isinstance(value, list) or not all(
        isinstance(item, str | int | float) and not isinstance(item, bool) for item in value
    ):
        told = reprlib.repr(value)
        raise DataError(
            f'{told} is no blend; write ["0.7", "A", "0.3", "B"] or ["A", "B"], and conversations'
            " or pairs one a line, in a .jsonl"
        )
    return blend_of([str(item) for item in value])


def as_number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return float(text)
    return None
