"""A run over several processes: who this one is, what one decides for all, and when all stop.

With one process nothing here does anything, but for `StopSignals`. jax is imported late.
"""

import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

from mlm_jax.errors import ConfigError, LayoutError, MlmJaxError
from mlm_jax.watchdog import Failure, Watchdog, connect

COORDINATOR = "MLM_JAX_COORDINATOR"  # host:port, the port being a free one on process 0's host
# How many processes there are and which one this is: as launch/local.sh and pods of Kubernetes set
# it; or Slurm's srun, and Open MPI's mpirun, whose coordinator JAX finds.
VARIABLES = (
    ("MLM_JAX_PROCESSES", "MLM_JAX_PROCESS"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)
UNHEARD_SECONDS = 60  # after which JAX itself aborts the others; the watchdog says more, earlier
LONGEST_DECISION = 24 * 3600 * 1000  # ms: to read through all files of a large checkpoint, say


class Place(NamedTuple):
    """This process among those of its run."""

    index: int = 0
    count: int = 1
    coordinator: str | None = None  # None: JAX finds it


class Joined:
    """What `start` has found: the one thing here that is remembered, as JAX's own is."""

    place: Place | None = None
    hosts: tuple[str, ...] = ()  # by process
    watchdog: Watchdog | None = None
    decisions = itertools.count()


def start(hang_seconds: float) -> None:
    """Joins the other processes of the run, before a device is used; with one, does nothing.

    hang_seconds: see `watchdog.Watchdog`. A second call does nothing. Raises ConfigError where the
    environment names several processes and not how they find each other.
    """
    if Joined.place is not None:
        return
    place = place_in_environment()
    if place.count > 1:
        join(place)
        address = coordination().coordinator_address.rpartition(":")[0].strip("[]")
        Joined.hosts = gathered(socket.gethostname(), place)
        links = connect(place.index, place.count, address, tell, ask)
        Joined.watchdog = Watchdog(place.index, Joined.hosts, links, hang_seconds)
        if place.index:
            logging.getLogger("mlm_jax").setLevel(logging.ERROR)  # the lead says it
    Joined.place = place


def place_in_environment() -> Place:
    """Raises ConfigError where the variables are not complete."""
    for count, index in VARIABLES:
        if os.environ.get(count, "1") == "1":
            continue
        coordinator, ours = os.environ.get(COORDINATOR), count == "MLM_JAX_PROCESSES"
        n, i = (os.environ.get(name, "") for name in (count, index))
        problems = []
        if not n.isdecimal() or int(n) < 1:
            problems.append(f"{count}={n!r} is no number of processes")
        elif not i.isdecimal() or int(i) >= int(n):
            problems.append(f"{index}={i!r} is none of 0 to {int(n) - 1}")
        if ours and not (coordinator or "").rpartition(":")[2].isdecimal():
            problems.append(
                f"{COORDINATOR}={coordinator or ''!r} is no host:port of process 0, such as"
                " node1:12345"
            )
        if problems:
            raise ConfigError(f"a run over several processes: {'; '.join(problems)}")
        return Place(int(i), int(n), coordinator if ours else None)
    if (n := os.environ.get("PMI_SIZE", "1")) != "1":
        raise ConfigError(
            f"PMI_SIZE={n}: JAX finds processes of Slurm's srun and Open MPI's mpirun only; with"
            f" another starter set {COORDINATOR}, {VARIABLES[0][0]} and {VARIABLES[0][1]}"
        )
    return Place()


def join(place: Place) -> None:
    """Waits until all processes are there. Collectives are Gloo's on CPUs, NCCL's on GPUs."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # or SIGTERM never comes to us
    keep_stdout_for_results()
    try:
        jax.distributed.initialize(
            place.coordinator, place.count, place.index,
            heartbeat_timeout_seconds=UNHEARD_SECONDS,
        )  # fmt: skip
    except (RuntimeError, ValueError) as why:
        raise MlmJaxError(
            f"process {place.index} of {place.count} has not found the others: {why}"
        ) from why


def keep_stdout_for_results() -> None:
    """Gloo prints a line for each of its connections there."""
    sys.stdout.flush()
    try:
        results = os.dup(1)
        sys.stdout = os.fdopen(results, "w", buffering=1, encoding=sys.stdout.encoding)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError:  # it is closed, or not a file
        return


def lead() -> bool:
    """Whether this process writes and decides for all."""
    if Joined.place:
        return Joined.place.index == 0
    index = next((i for n, i in VARIABLES if os.environ.get(n, "1") != "1"), "")
    return os.environ.get(index, "0") == "0"


def check_all_used(mesh: Any) -> None:
    """Raises LayoutError where no device of some process is in the mesh."""
    import jax

    used = {device.process_index for device in mesh.devices.flat}
    if len(used) < jax.process_count():
        raise LayoutError(
            f"the layout takes {mesh.size} devices, all of {len(used)} of {jax.process_count()}"
            " processes; start fewer processes, or split over more devices (layout.dp)"
        )


def several() -> bool:
    return Joined.place is not None and Joined.place.count > 1


def processes_here() -> int:
    """On this host."""
    return max(Joined.hosts.count(socket.gethostname()), 1)


def lead_says(decide: Callable[[], Any]) -> Any:
    """What decide() gives in the lead, in every process: what JSON can hold.

    For all that depends on files or clocks, so that all processes run the same programs in the same
    order. The others wait, and come no further where it raises.
    """
    if not several():
        return decide()
    key = f"decision/{next(Joined.decisions)}"
    if lead():
        value = decide()
        tell(key, json.dumps(value))
        return value
    return json.loads(ask(key))


def coordination() -> Any:
    """JAX's service that processes meet at; it has no public name, and Orbax uses it like this."""
    from jax._src.distributed import global_state

    return global_state


def tell(key: str, text: str) -> None:
    coordination().client.key_value_set(f"mlm_jax/{key}", text)


def ask(key: str) -> str:
    """What some process tells under this key, once it does."""
    return coordination().client.blocking_key_value_get(f"mlm_jax/{key}", LONGEST_DECISION)


def gathered(text: str, place: Place) -> tuple[str, ...]:
    """The texts of all processes, by process."""
    tell(f"gathered/{place.index:06}", text)
    coordination().client.wait_at_barrier("mlm_jax/gathered", LONGEST_DECISION)
    found = coordination().client.key_value_dir_get("mlm_jax/gathered/")
    return tuple(text for _, text in sorted(found))


def at(phase: str, step: int) -> None:
    """Tells the watchdog, if there is one, what this process is about to do: a word of PHASES."""
    if Joined.watchdog:
        Joined.watchdog.at(phase, step)


@contextmanager
def together() -> Iterator[None]:
    """An error in here ends all processes of the run, told once; nobody waits for the others."""
    try:
        yield
    except BaseException as why:
        if not Joined.watchdog:
            raise
        Joined.watchdog.fail(failure(why))
    if Joined.watchdog:
        Joined.watchdog.finish()


def failure(why: BaseException) -> Failure:
    """As the command line tells it. Errors with a message of ours often come in all processes."""
    if isinstance(why, MlmJaxError):
        return Failure(f"mlm-jax: {why}", str(why), 1 if type(why) is MlmJaxError else 2, True)
    reason = f"{type(why).__name__}: {why}".partition("\n")[0][:300]
    return Failure("".join(traceback.format_exception(why)).rstrip(), reason, 1, False)


class AgreedStop:
    """Whether any process was asked to stop: the same answer in all, which ask at the same time."""

    LAG = 2  # steps that the devices have before them while `after` waits for an older one

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

    def after(self, step: int) -> bool:
        """Whether to stop after this step, which was just given to the devices.

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

    def after(self, step: int) -> bool:
        """Whether to stop after this step, which was just given to the devices."""
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
