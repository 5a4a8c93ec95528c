"""The command line in a process that fails in some way.

python -m tests.faulty_process FAULT:PROCESS:STEP train ...

FAULT   none
        error, hang   while it reads the data of this step
        full          its disk is, when it writes the checksums of a checkpoint
        seed          it has another one
        typo          a setting of its is misspelt
        twice         none: mlm_jax.train, called by all to train up to this step, and twice as far
"""

import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mlm_jax.__main__ import main


def broken(fault: str, step: int) -> None:
    from mlm_jax.data.placement import Feed

    ahead = Feed.ahead

    def some(feed: Feed, start: int, stop: int) -> Iterator[dict]:
        for k, batch in enumerate(ahead(feed, start, stop), start + 1):
            if k == step:
                if fault == "error":
                    raise ZeroDivisionError(f"the data of step {k} are bad")
                read_slowly()
            yield batch

    Feed.ahead = some


def full() -> None:
    from mlm_jax.checkpoint import manager

    def write_manifest(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    manager.write_manifest = write_manifest


def twice(step: int, words: list[str]) -> None:
    import mlm_jax

    pairs = (word.removeprefix("--config.").partition("=") for word in words if "=" in word)
    settings = {key: value for key, _, value in pairs}
    for last in (step, 2 * step):
        run = mlm_jax.load_config("quickstart", settings | {"train.steps": last})
        mlm_jax.train(run, words[-1])


def read_slowly() -> None:
    time.sleep(600)


if __name__ == "__main__":
    (fault, process, step), words = sys.argv[1].split(":"), sys.argv[2:]
    if fault == "twice":
        sys.exit(twice(int(step), words))
    if os.environ["MLM_JAX_PROCESS"] == process:
        if fault in ("error", "hang"):
            broken(fault, int(step))
        if fault == "full":
            full()
        words += {"seed": ["--config.train.seed=7"], "typo": ["--config.modle.x=1"]}.get(fault, [])
    sys.exit(main(words))
