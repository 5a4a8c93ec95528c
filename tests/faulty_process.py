"""The command line in a process that fails in some way.

python -m tests.faulty_process FAULT:PROCESS:STEP train ...

FAULT   none
        error, hang   while it reads the data of this step
        full          its disk is, when it writes the checksums of a checkpoint
        save, evaluate  it gets SIGTERM while it does that
        seed          it has another one
        typo          a setting of its is misspelt
        rows          none: all say at the end how many rows of data each of them has read
        twice         none: mlm_jax.train, called by all to train up to this step, and twice as far
"""

import errno
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def asked_to_stop(where: str) -> None:
    from mlm_jax.checkpoint.manager import Checkpoints
    from mlm_jax.evaluate import examination

    save, at = Checkpoints.save, examination.at

    def saved(checkpoints: Checkpoints, step: int, state: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(checkpoints, step, state)

    def evaluated(phase: str, step: int) -> None:
        if phase == "evaluate":
            examination.at = at
            os.kill(os.getpid(), signal.SIGTERM)

    if where == "save":
        Checkpoints.save = saved
    else:
        examination.at = evaluated


def counted() -> Counter[str]:
    """Rows read by this process, by split."""
    from mlm_jax.data.pipeline import Batches, HostBatch

    batch, read = Batches.batch, Counter()

    def some(batches: Batches, *args: Any, **kwargs: Any) -> HostBatch:
        found = batch(batches, *args, **kwargs)
        read[batches.split] += len(found["weights"])
        return found

    Batches.batch = some
    return read


def twice(step: int, words: list[str]) -> None:
    import mlm_jax

    pairs = (word.removeprefix("--config.").partition("=") for word in words if "=" in word)
    settings = {key: value for key, _, value in pairs}
    for last in (step, 2 * step):
        run = mlm_jax.load_config("quickstart", settings | {"train.steps": last})
        mlm_jax.train(run, words[-1])


def read_slowly() -> None:
    time.sleep(600)


def go(fault: str, step: int, words: list[str]) -> int:
    if fault in ("error", "hang"):
        broken(fault, step)
    if fault == "full":
        full()
    if fault in ("save", "evaluate"):
        asked_to_stop(fault)
    words += {"seed": ["--config.train.seed=7"], "typo": ["--config.modle.x=1"]}.get(fault, [])
    return main(words)


if __name__ == "__main__":
    (fault, process, step), words = sys.argv[1].split(":"), sys.argv[2:]
    if fault == "twice":
        sys.exit(twice(int(step), words))
    here = os.environ["MLM_JAX_PROCESS"]
    read = counted() if fault == "rows" else None
    status = go(fault if here == process else "none", int(step), words)
    if read:
        print(f"process {here} read {read['train']} and {read['valid']} rows", file=sys.stderr)
    sys.exit(status)
