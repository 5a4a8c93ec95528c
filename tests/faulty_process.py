"""The command line in a process that errs, or hangs, while it reads the data of a step.

python -m tests.faulty_process FAULT:PROCESS:STEP train ...     FAULT: none | error | hang
"""

import os
import sys
import time
from collections.abc import Iterator

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


def read_slowly() -> None:
    time.sleep(600)


if __name__ == "__main__":
    fault, process, step = sys.argv[1].split(":")
    if fault != "none" and os.environ["MLM_JAX_PROCESS"] == process:
        broken(fault, int(step))
    sys.exit(main(sys.argv[2:]))
