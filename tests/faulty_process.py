"""The command line in a process that fails in some way.

python -m tests.faulty_process FAULT:PROCESS:STEP train ...

FAULT   none
        error, hang   while it reads the data of this step
        full          its disk is, when it writes the checksums of a checkpoint
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


def read_slowly() -> None:
    time.sleep(600)


if __name__ == "__main__":
    fault, process, step = sys.argv[1].split(":")
    if os.environ["MLM_JAX_PROCESS"] == process:
        if fault in ("error", "hang"):
            broken(fault, int(step))
        if fault == "full":
            full()
    sys.exit(main(sys.argv[2:]))
