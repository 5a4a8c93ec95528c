"""When a run is asked to stop: by a signal to its process, or to any one of several."""

import os
import signal
import threading
from collections import deque
from types import FrameType
from typing import Any

from mlm_jax.distributed import several

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

    def after_step(self) -> bool:
        """Whether to stop after the step that was just given to the devices."""
        return bool(self)

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


class AgreedStop:
    """Whether any process was asked to stop: the same answer in all, which ask at the same time."""

    LAG = 2  # steps that the devices have before them while `after_step` waits for an older one

    def __init__(self, own: "StopSignals"):
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        mesh = jax.sharding.Mesh(jax.devices(), ("device",))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self.own, self.agreed = own, False
        self._split = NamedSharding(mesh, PartitionSpec("device"))
        self._any = jax.jit(jnp.any, out_shardings=everywhere)
        self._asked: deque[Any] = deque()

    def __bool__(self) -> bool:
        self.agreed = self.agreed or bool(self._ask())
        return self.agreed

    def after_step(self) -> bool:
        """Whether to stop after the step that was just given to the devices.

        The answer is that of LAG steps before, which the devices have by now: they need not wait.
        """
        self._asked.append(self._ask())
        if len(self._asked) > self.LAG:
            self.agreed = bool(self._asked.popleft()) or self.agreed
        return self.agreed

    def _ask(self) -> Any:
        import jax
        import numpy as np

        own = np.full(jax.local_device_count(), bool(self.own))
        return self._any(jax.make_array_from_process_local_data(self._split, own))


def agreed(stop: "StopSignals") -> "StopSignals | AgreedStop":
    """These signals, or with several processes those of all."""
    return AgreedStop(stop) if several() else stop
