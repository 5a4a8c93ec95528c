"""Many texts to ids: by `tokenizers`, and faster where tiktoken is proved to give the same."""

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tokenizers

from mlm_jax.data.tokenizer.exact_bpe import ExactBpe, exact_bpe

log = logging.getLogger(__name__)

WORTH_IT = 2_000_000  # characters: the proof takes as long as `tokenizers` does for them
CHECKED = 64  # texts that both ways encode before the faster one is believed
TOGETHER = 16  # texts a thread takes at once


class BatchEncoder:
    """Encodes with a `tokenizers` backend, its own way or a faster one with the same ids."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.characters = 0  # asked for so far
        self.faster: ExactBpe | None = None
        self.asked = False

    def __reduce__(self):
        return BatchEncoder, (self.backend,)  # a process proves for itself

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text."""
        self.characters += sum(map(len, texts))
        if not self.asked and self.characters >= WORTH_IT:
            self.asked, self.faster = True, self.checked(exact_bpe(self.backend), texts)
        if self.faster is None:
            return self.slow(texts)
        found = in_threads(self.faster, texts)
        left = [n for n, ids in enumerate(found) if ids is None]
        rest = iter(self.slow([texts[n] for n in left]))
        return [next(rest) if ids is None else ids for ids in found]

    def slow(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def checked(self, faster: ExactBpe | None, texts: Sequence[str]) -> ExactBpe | None:
        """The faster encoder, if it gives the first of these texts the same ids."""
        if faster is None:
            return None
        some = texts[:CHECKED]
        for text, ids, expected in zip(some, map(faster, some), self.slow(some), strict=True):
            if ids is not None and not np.array_equal(ids, expected):
                log.warning(
                    "tiktoken gives other ids than tokenizers, which is used alone: for %r...",
                    text[:60],
                )
                return None
        return faster


def in_threads(encode: ExactBpe, texts: Sequence[str]) -> list[np.ndarray | None]:
    if (n := threads()) == 1 or len(texts) == 1:
        return [*map(encode, texts)]
    groups = [texts[start : start + TOGETHER] for start in range(0, len(texts), TOGETHER)]
    with ThreadPoolExecutor(n) as pool:  # tiktoken lets other threads run while it works
        done: Iterator[list] = pool.map(lambda group: [*map(encode, group)], groups)
        return [*itertools.chain.from_iterable(done)]


def threads() -> int:
    """RAYON_NUM_THREADS, which `tokenizers` heeds too; else the cores this process may use."""
    asked = os.environ.get("RAYON_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1
