"""Processes of a run watch each other: one that ends, fails or hangs ends all, and is named.

Process 0 listens and the others connect to it; both send a line of JSON every second. The system
closes the connections of a process however it ends, so that is known at once, whatever the main
thread does: collectives would tell late or never, and not who it was. A process that fails says so
before it ends. One that is alive but does not get on is known by what it last said of itself.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

PULSE = 1.0  # seconds between two lines
SILENT = 30.0  # seconds without a line after which a process counts as lost: it may be busy
GRACE = 3.0  # seconds that an error waits for news of what it may follow from
CONNECT = 300.0  # seconds for all processes to come
PHASES = ("start", "compile", "data", "step", "save", "evaluate")  # in the order of a step
UNTIMED = ("start", "compile")  # which take what they take


class Progress(NamedTuple):
    """What a process is about, PHASES[phase] of a step. They compare as one comes after another."""

    step: int = 0
    phase: int = 0


class Verdict(NamedTuple):
    """Why the run ends: what happened to which processes."""

    processes: list[int]
    text: str
    status: int = 1
    hangs: bool = False


class Failure(NamedTuple):
    """An error of this process. told: for a person; reason: in a line; of_all: not only here."""

    told: str
    reason: str
    status: int
    of_all: bool


class Link:
    """A connection to another process: what was heard of it, and how many seconds ago."""

    def __init__(self, connection: socket.socket, index: int):
        self.connection, self.index = connection, index
        self.silent, self.progress, self.idle = 0.0, Progress(), 0.0
        self.closed = self.finished = False
        self._rest = b""

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # which reading finds too
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """What there is; at the end of the connection, `closed` is set."""
        try:
            got = self.connection.recv(2**16)
        except OSError:
            got = b""
        self.silent, self.closed = 0.0, not got
        *lines, self._rest = (self._rest + got).split(b"\n")
        return [json.loads(line) for line in lines]


def connect(
    index: int, count: int, lead_host: str, tell: Callable[[str, str], None],
    ask: Callable[[str], str],
) -> list[Link]:  # fmt: skip
    """Of process 0 links to all others, of those one to it. tell, ask: how it says its port."""
    if index:
        port, key = ask("watchdog").split()
        connection = socket.create_connection((lead_host, int(port)), CONNECT)
        link = Link(connection, 0)
        link.send(key=key, index=index)
        connection.settimeout(CONNECT)
        return [link]
    key, links = secrets.token_hex(16), {}
    with listener() as door:
        tell("watchdog", f"{door.getsockname()[1]} {key}")
        while len(links) < count - 1:
            connection, _ = door.accept()
            connection.settimeout(CONNECT)
            hello = connection.makefile("rb").readline(2**10)
            if key.encode() in hello:  # else it is none of ours
                link = Link(connection, json.loads(hello)["index"])
                links[link.index] = link
    return [links[i] for i in sorted(links)]


def listener() -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    door = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=1024)
    door.settimeout(CONNECT)
    return door


class Watchdog:
    """A thread that ends this process when the run is over for another, and says why.

    hosts: by process. hang_seconds: how long the process that is furthest behind may stay where it
    is, from the first step on; then it shows where that is, and the run ends.
    """

    def __init__(
        self, index: int, hosts: Sequence[str], links: Sequence[Link], hang_seconds: float
    ):
        self.index, self.hosts, self.links = index, hosts, links
        self.hang_seconds, self.progress, self.idle = hang_seconds, Progress(), 0.0
        self._failure: Failure | None = None
        self._finished = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        hold_aborts()
        self._thread.start()

    def at(self, phase: str, step: int) -> None:
        """What this process is about to do: a word of PHASES."""
        self.progress = Progress(step, PHASES.index(phase))

    def fail(self, failure: Failure) -> NoReturn:
        """Ends all processes. The thread does it, which may hear what this error follows from."""
        self._failure = failure
        self._thread.join()
        os._exit(failure.status)

    def finish(self) -> None:
        """This process has done its part; its end is nobody's loss."""
        self._finished = True
        for link in self.links:
            link.send(finished=True)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as ready:
            for link in self.links:
                ready.register(link.connection, selectors.EVENT_READ, link)
            before, sent, failing, seen = time.monotonic(), 0.0, 0.0, self.progress
            while True:
                for key, _ in ready.select(PULSE / 4):
                    self._hear(key.data)
                    if key.data.closed:
                        ready.unregister(key.fileobj)
                # Time in which this process itself was stopped or kept busy does not count.
                now = time.monotonic()
                passed, before = min(now - before, PULSE), now
                for link in self.links:
                    link.silent += passed
                self.idle = self.idle + passed if self.progress is seen else 0.0
                seen = self.progress
                if not self._finished and (verdict := self._judge()):
                    self._end(verdict)
                if self._failure:
                    failing += passed
                    self._fail(self._failure, failing)
                if now - sent > PULSE:
                    sent = now
                    for link in self.links:
                        link.send(progress=seen, idle=self.idle)

    def _hear(self, link: Link) -> None:
        for message in link.receive():
            if "progress" in message:
                link.progress, link.idle = Progress(*message["progress"]), message["idle"]
            if "verdict" in message:
                self._end(Verdict(*message["verdict"]))
            link.finished = link.finished or "finished" in message

    def _judge(self) -> Verdict | None:
        for link in self.links:
            if not link.finished and link.closed:
                return Verdict([link.index], "was lost: its connection closed")
            if not link.finished and link.silent > SILENT:
                text = f"was lost: it gave no sign of life for {SILENT:.0f} s"
                return Verdict([link.index], text)
        return self._hang() if self.index == 0 else None

    def _hang(self) -> Verdict | None:
        where = {0: (self.progress, self.idle)}
        where |= {link.index: (link.progress, link.idle) for link in self.links}
        behind = min(progress for progress, _ in where.values())
        late = {i: idle for i, (progress, idle) in where.items() if progress == behind}
        idle, phase = min(late.values()), PHASES[behind.phase]
        if idle < self.hang_seconds or phase in UNTIMED:
            return None
        others = "the others wait" if len(late) < len(where) else "all are there"
        text = f"hangs: {phase} of step {behind.step} since {idle:.0f} s, and {others}"
        limit = f"train.hang_seconds={self.hang_seconds:g} allows no more"
        return Verdict(sorted(late), f"{text}; {limit}", hangs=True)

    def _fail(self, failure: Failure, seconds: float) -> None:
        """Tells the error of this process, unless another's is heard of first."""
        if seconds < GRACE and not (failure.of_all and self.index == 0):
            return
        self._say(failure.told)
        verdict = Verdict([self.index], f"failed: {failure.reason}", failure.status)
        self._end(verdict, told=True)

    def _end(self, verdict: Verdict, told: bool = False) -> NoReturn:
        """Passes a verdict on, and ends this process."""
        try:
            if self.index == 0 or told:
                for link in self.links:
                    link.send(verdict=verdict)
            known = self._failure and f"failed: {self._failure.reason}" == verdict.text
            request = verdict.processes == [0] and verdict.status == 2  # which process 0 has told
            if not (told or known or request):
                self._say(f"mlm-jax: {self._names(verdict.processes)} {verdict.text}")
            if verdict.hangs and self.index in verdict.processes:
                faulthandler.dump_traceback(sys.stderr)
            if self.index == 0 or told:
                self._see_them_end()
            sys.stdout.flush()
        finally:
            os._exit(verdict.status)

    def _see_them_end(self) -> None:
        """JAX aborts the others, in many words, if the process that started it ends before them."""
        end = time.monotonic() + GRACE
        for link in self.links:
            while not link.closed and (left := end - time.monotonic()) > 0:
                link.connection.settimeout(left)
                link.receive()

    def _say(self, text: str) -> None:
        who = f"[{self._names([self.index])}] " if self.index else ""
        print(who + text, file=sys.stderr, flush=True)

    def _names(self, processes: Sequence[int]) -> str:
        """'process 3 of 4 on node1'."""
        which = ", ".join(f"{i} of {len(self.hosts)} on {self.hosts[i]}" for i in processes[:8])
        more = f" and {len(processes) - 8} more" * (len(processes) > 8)
        return f"process{'es' * (len(processes) > 1)} {which}{more}"


def hold_aborts() -> None:
    """JAX aborts a process that has lost process 0; the watchdog shall have its say before.

    The thread that aborts first sleeps for SIGABRT = 6 seconds. No other function of the C library
    that a signal handler may call takes a number and waits.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "sleep") and hasattr(libc, "signal"):
        libc.signal.restype = None
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
