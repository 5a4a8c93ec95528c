"""Several datasets as one: which they are, and their samples in the order of training.

Source: megatron/core/datasets/{blended_dataset,blended_megatron_dataset_builder,utils}.py (core
0.16 and 0.20).
"""

import contextlib
import functools
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlm_jax.data import files
from mlm_jax.data.blend_order import (
    BlendIndex,
    blend_index,
    exhaustive_index,
    normalised,
    samples_per_dataset,
)
from mlm_jax.data.index_cache import cached
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.sampling import GptSamples
from mlm_jax.errors import DataError

SPLITS = ("train", "valid", "test")
MOST = 32766  # datasets: they are counted in int16
COUNTED_AT_ONCE = 2**22  # samples, since counting makes a wider copy of them


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

    def open(self) -> list[IndexedDataset]:
        """Raises DataError with every file that is missing or damaged."""
        opened, problems = [], []
        for prefix in self.prefixes:
            try:
                opened.append(IndexedDataset(prefix))
            except DataError as problem:
                problems.append(str(problem))
        if problems:
            raise DataError("\n  ".join(problems))
        return opened

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
    if not text.endswith((".txt", ".json")):
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
        raise DataError(f'{value!r} is no blend; write ["0.7", "A", "0.3", "B"] or ["A", "B"]')
    return blend_of([str(item) for item in value])


def as_number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return float(text)
    return None


class BlendedSamples:
    """Every sample of several splits, in the order of training; used as GptSamples are.

    weights     of the splits, which need not add up to 1: n_samples are asked for, and there may
                be a few more, since the share of each is rounded up
    None        each split gives one epoch, and weighs what it has; there are as many samples as
                all of them have, or n_samples if that is less

    Raises DataError as GptSamples does, for weights without n_samples, and where a split would
    have to give more than it has, which a tiny one among many may.
    """

    def __init__(
        self,
        splits: Sequence[tuple[IndexedDataset, range]],
        weights: Sequence[float] | None,
        *,
        n_samples: int | None,
        seq_len: int,
        seed: int,
        cache: Path | None = None,
    ):
        self._arguments = splits, weights
        self._options = {"n_samples": n_samples, "seq_len": seq_len, "seed": seed, "cache": cache}
        sizes: Sequence[int | None] = [None] * len(splits)
        if weights is not None:
            if n_samples is None:
                raise DataError("a blend with weights never ends; leave them out for one epoch")
            weights = normalised(weights)
            sizes = samples_per_dataset(weights, n_samples)
            n_samples = sum(samples_per_dataset(weights, n_samples, surplus=0.0))
        self.parts = [
            GptSamples(indexed, sequences, n_samples=size, seq_len=seq_len, seed=seed, cache=cache)
            for (indexed, sequences), size in zip(splits, sizes, strict=True)
        ]
        there = [len(part) for part in self.parts]
        if n_samples is not None:
            n_samples = n_samples if weights is not None else min(n_samples, sum(there))
            build = functools.partial(blend_index, normalised(weights or there), n_samples)
        else:
            build = functools.partial(exhaustive_index, there)
        key = {"index": "blend, 1", "weights": weights or there, "n_samples": n_samples}
        self.index = BlendIndex(**cached(cache, key, lambda: build()._asdict()))
        self._check(there)

    def __len__(self) -> int:
        return len(self.index.dataset)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.parts[self.index.dataset[i]][int(self.index.sample[i])]

    def __reduce__(self):
        return functools.partial(BlendedSamples, **self._options), self._arguments

    def pieces(self, i: int) -> list[np.ndarray]:
        """Sample i as the stretches of documents it is made of; nothing else is read."""
        return self.parts[self.index.dataset[i]].pieces(int(self.index.sample[i]))

    def origin(self, i: int) -> IndexedDataset:
        """The file that sample i is from."""
        return self.parts[self.index.dataset[i]].indexed

    def _check(self, there: list[int]) -> None:
        taken = np.zeros(len(there), np.int64)
        for k in range(0, len(self), COUNTED_AT_ONCE):
            some = self.index.dataset[k : k + COUNTED_AT_ONCE]
            taken += np.bincount(some, minlength=len(there))
        short = [
            f"{part.indexed.prefix}: {asked} samples are asked of it and it gives {has};"
            " raise its weight or leave it out"
            for part, asked, has in zip(self.parts, taken.tolist(), there, strict=True)
            if asked > has
        ]
        if short:
            raise DataError("\n  ".join(short))
