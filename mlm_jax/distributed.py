"""What a run owes to the machines it runs on: how many processes, and when it is asked to stop."""

import os
import signal
import threading
from types import FrameType

from mlm_jax.errors import LayoutError

TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def refuse_several() -> None:
    """Raises LayoutError in a process started as one of several: each would train alone."""
    for name in TASKS:
        if (count := os.environ.get(name, "1")) != "1":
            raise LayoutError(
                f"{name}={count}: a run over several processes is not built yet; start one"
            )


class StopSignals:
    """SIGTERM and SIGINT ask a run to stop at the next step; a second one ends it at once.

    Outside the main thread, as in some notebooks, signals keep their meaning.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
