"""Many texts to ids: by `tokenizers`, and faster where tiktoken is proved to give the same."""

import functools
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tokenizers

from mlm_jax.data.tokenizer.exact_bpe import ExactBpe, exact_bpe

WORTH_IT = 2_000_000  # characters: the proof takes as long as `tokenizers` does for them
TOGETHER = 16  # texts a thread takes at once


class BatchEncoder:
    """Encodes with a `tokenizers` backend, its own way or a faster one with the same ids."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.characters = 0  # asked for so far

    def __reduce__(self):
        return BatchEncoder, (self.backend,)  # a process proves for itself

    @functools.cached_property
    def faster(self) -> ExactBpe | None:
        return exact_bpe(self.backend)

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text."""
        self.characters += sum(map(len, texts))
        if self.characters < WORTH_IT or self.faster is None:
            return self.slow(texts)
        found = in_threads(self.faster, texts)
        rest = iter(self.slow([t for t, ids in zip(texts, found, strict=True) if ids is None]))
        return [next(rest) if ids is None else ids for ids in found]

    def slow(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]


def in_threads(encode: ExactBpe, texts: Sequence[str]) -> list[np.ndarray | None]:
    if (n := threads()) == 1:  # a worker process of a build: a pool would cost it a sixth
        return [*map(encode, texts)]
    groups = [texts[start : start + TOGETHER] for start in range(0, len(texts), TOGETHER)]
    with ThreadPoolExecutor(n) as pool:  # tiktoken lets other threads run while it works
        done = pool.map(lambda group: [*map(encode, group)], groups)
        return [*itertools.chain.from_iterable(done)]


def threads() -> int:
    """RAYON_NUM_THREADS, which `tokenizers` heeds too; else the cores this process may use."""
    asked = os.environ.get("RAYON_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1
