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


STOP = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """SIGTERM and SIGINT ask a run to stop at the next step; a second one ends it at once.

    Python calls a handler between two lines of the main thread: not while XLA compiles there, which
    takes minutes for a large model. So a thread of our own hears the signals as well, through the
    file descriptor that Python's C handler writes their numbers to.

    Outside the main thread, as in some notebooks, signals keep their meaning.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, object] = {}
        self._wakeup, self._heard = -1, -1  # file descriptors: the one before, and our pipe's end

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOP:
                self._before[number] = signal.signal(number, self._receive)
            hears, self._heard = os.pipe()
            os.set_blocking(self._heard, False)
            self._wakeup = signal.set_wakeup_fd(self._heard, warn_on_full_buffer=False)
            threading.Thread(target=hear, args=(hears,), name="stop_signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._heard)  # ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number


def hear(pipe: int) -> None:
    """Ends the process at the second signal to stop, whatever the main thread is doing."""
    with open(pipe, "rb", buffering=0) as numbers:
        stops = 0
        while number := numbers.read(1):
            stops += number[0] in STOP
            if stops == 2:
                os._exit(128 + number[0])
