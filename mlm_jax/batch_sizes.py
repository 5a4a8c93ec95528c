"""How many sequences a step takes: always as many, or more of them the more tokens were seen."""

import bisect
import re
from collections.abc import Sequence
from typing import NamedTuple

from mlm_jax.config import RunConfig

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class Stage(NamedTuple):
    """From batch `first` on, before which `samples` were read, a batch has `size` samples."""

    first: int
    samples: int
    size: int


class BatchSizes:
    """The size and the first sample of batch 0, 1, 2, ...

    A size is taken up by the first batch before which that many tokens were seen, in whole samples,
    as Megatron-LM's --step-batch-size-schedule does (core/num_microbatches_calculator.py, 0.20).
    """

    def __init__(self, schedule: Sequence[tuple[int, int]]):
        """schedule: (samples seen, size from then on), as `parse_schedule` gives it."""
        self.stages = [Stage(0, 0, schedule[0][1])]
        for threshold, size in schedule[1:]:
            first, samples, before = self.stages[-1]
            batches = max(-(-(threshold - samples) // before), 0)
            self.stages.append(Stage(first + batches, samples + batches * before, size))

    @classmethod
    def of(cls, run: RunConfig) -> "BatchSizes":
        text = run.train.batch_schedule
        if text is None:
            return cls([(0, run.train.global_batch_size)])
        return cls(parse_schedule(text, run.model.seq_len))

    def size(self, k: int) -> int:
        """Samples of batch k."""
        return self._stage(k).size

    def start(self, k: int) -> int:
        """Samples read before batch k: the number of its first one."""
        first, samples, size = self._stage(k)
        return samples + (k - first) * size

    def sizes(self, batches: int | None = None) -> list[int]:
        """The different sizes of that many batches, or of all there will ever be, ascending."""
        return sorted({s.size for s in self.stages if batches is None or s.first < batches})

    def _stage(self, k: int) -> Stage:
        return self.stages[bisect.bisect_right(self.stages, k, key=lambda s: s.first) - 1]


def parse_schedule(text: str, seq_len: int) -> list[tuple[int, int]]:
    """[(samples seen, batch size)] of "0:32 1B:64 2.5B:128", thresholds in tokens.

    Raises ValueError saying what was expected.
    """
    schedule = []
    for entry in text.replace(",", " ").split():
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?):(\d+)", entry.upper())
        if not match:
            raise ValueError(f"a list of TOKENS:SIZE like '0:32 1B:64'; {entry!r} is none")
        tokens = round(float(match[1]) * UNITS[match[2]])
        schedule.append((tokens // seq_len, int(match[3])))
    thresholds = [threshold for threshold, _ in schedule]
    if not schedule or thresholds[0] != 0:
        raise ValueError("a list of TOKENS:SIZE that begins with 0:SIZE")
    if sorted(set(thresholds)) != thresholds:
        raise ValueError(f"a list with more tokens in each entry, at least {seq_len} more")
    if min(size for _, size in schedule) < 1:
        raise ValueError("a list of sizes of 1 or more")
    return schedule
