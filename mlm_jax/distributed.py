"""A run over several processes: who this one is, what one decides for all, and that all end.

With one process nothing here does anything. jax is imported late.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlm_jax.errors import ConfigError, LayoutError, MlmJaxError
from mlm_jax.links import connect
from mlm_jax.watchdog import Failure, Watchdog

# What launch/local.sh sets, and a pod of Kubernetes: how many processes there are, which one this
# is, and host:port of process 0, with a port that is free there.
OURS = ("MLM_JAX_PROCESSES", "MLM_JAX_PROCESS", "MLM_JAX_COORDINATOR")
# How many there are and which one this is, of srun and mpirun. JAX finds their process 0.
STARTERS = (
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)  # fmt: skip
UNHEARD_SECONDS = 120  # after which JAX itself aborts the others; the watchdog says more, earlier
LONGEST_DECISION = 24 * 3600 * 1000  # ms: to read through all files of a large checkpoint, say


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of its run."""

    index: int = 0
    count: int = 1
    coordinator: str | None = None  # None: JAX finds it


class Joined:
    """What `start` has found: the one thing here that is remembered, as JAX's own is."""

    place: Place | None = None
    hosts: tuple[str, ...] = ()  # by process
    watchdog: Watchdog | None = None
    decisions, gatherings = itertools.count(), itertools.count()


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
    started = (names for names in STARTERS if os.environ.get(names[0], "1") != "1")
    ours = any(name in os.environ for name in OURS)
    count, index = OURS[:2] if ours else next(started, ("", ""))
    n, i = os.environ.get(count, ""), os.environ.get(index, "")
    if not count:
        if (n := os.environ.get("PMI_SIZE", "1")) != "1":
            raise ConfigError(
                f"PMI_SIZE={n}: JAX finds the processes of Slurm's srun and Open MPI's mpirun; with"
                f" another starter set {', '.join(OURS)}"
            )
        return Place()
    problems, coordinator = [], os.environ.get(OURS[2], "") if ours else None
    if not n.isdecimal() or int(n) < 1:
        problems.append(f"{count}={n!r} is no number of processes")
    elif not i.isdecimal() or int(i) >= int(n):
        problems.append(f"{index}={i!r} is none of 0 to {int(n) - 1}")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        problems.append(
            f"{OURS[2]}={coordinator!r} is no host:port of process 0, such as node1:12345"
        )
    if problems:
        raise ConfigError(f"a run over several processes: {'; '.join(problems)}")
    return Place(int(i), int(n), coordinator)


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
    with contextlib.suppress(OSError):  # it is closed
        sys.stdout.flush()
        results = os.dup(1)
        sys.stdout = os.fdopen(results, "w", buffering=1, encoding=sys.stdout.encoding)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def lead() -> bool:
    """Whether this process writes and decides for all."""
    try:
        return (Joined.place or place_in_environment()).index == 0
    except ConfigError:  # which this process has to tell itself
        return True


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


def devices_here(mesh: Any) -> int:
    """How many devices of a mesh are of processes on this host."""
    hosts = Joined.hosts or (socket.gethostname(),)
    return sum(hosts[d.process_index] == socket.gethostname() for d in mesh.devices.flat)


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
    name = f"gathered/{next(Joined.gatherings)}"
    tell(f"{name}/{place.index:06}", text)
    coordination().client.wait_at_barrier(f"mlm_jax/{name}", LONGEST_DECISION)
    found = coordination().client.key_value_dir_get(f"mlm_jax/{name}/")
    return tuple(text for _, text in sorted(found))


def check_same(values: Mapping[str, Any]) -> None:
    """Raises ConfigError, in all processes, where some have other values than process 0.

    values: nested, what JSON can hold. Different programs would wait for each other for ever, and
    different data would train a model of neither.
    """
    if not (Joined.place and several()):
        return
    first, *others = map(json.loads, gathered(json.dumps(values), Joined.place))
    differ = [
        f"process {i} of {Joined.place.count} on {Joined.hosts[i]}: {', '.join(found[:8])}"
        for i, there in enumerate(others, 1)
        if (found := list(differences(first, there)))
    ]
    if differ:
        more = [f"and {len(differ) - 8} more"] * (len(differ) > 8)
        raise ConfigError(
            "all processes of a run need the same settings and the same data; give them one command"
            " and one version of the files. These differ from process 0:\n  "
            + "\n  ".join(differ[:8] + more)
        )


def differences(first: Any, there: Any, key: str = "") -> Iterator[str]:
    """'train.seed is 1, not 0' for each value that differs."""
    if isinstance(first, dict) and isinstance(there, dict):
        for name in sorted(first.keys() | there.keys()):
            yield from differences(first.get(name), there.get(name), f"{key}.{name}".strip("."))
    elif first != there:
        yield f"{key} is {there!r}, not {first!r}"


def at(phase: str, step: int) -> None:
    """Tells the watchdog, if there is one, what this process is about to do: a word of PHASES."""
    if Joined.watchdog:
        Joined.watchdog.at(phase, step)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error in here ends all processes of the run, told once; nobody waits for the others.

    Between two of these, and after the last, a process may end without being missed.
    """
    if not (watchdog := Joined.watchdog):
        yield
        return
    watchdog.begin()
    try:
        yield
    except BaseException as why:
        watchdog.fail(failure(why))
    watchdog.finish()


def failure(why: BaseException) -> Failure:
    """As the command line tells it. Errors with a message of ours often come in all processes."""
    if isinstance(why, MlmJaxError):
        return Failure(f"mlm-jax: {why}", str(why), 1 if type(why) is MlmJaxError else 2, True)
    reason = f"{type(why).__name__}: {why}".partition("\n")[0][:300]
    return Failure("".join(traceback.format_exception(why)).rstrip(), reason, 1, False)
