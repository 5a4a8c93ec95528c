"""Processes of a run watch each other: one that ends, fails or hangs ends all, and is named.

Process 0 listens and the others connect to it; both send a line of JSON every second. The system
closes the connections of a process however it ends, so that is known at once, whatever the main
thread does: collectives would tell late or never, and not who it was. A process that fails says so
before it ends. One that is alive but does not get on is known by what it last said of itself.
"""

import ctypes
import faulthandler
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from mlm_jax.links import Link

PULSE = 1.0  # seconds between two lines
POLL = PULSE / 4  # seconds between two looks at all processes
SILENT = 50.0  # seconds without a line after which a process counts as lost: it may be busy
GRACE = 3.0  # seconds that an error waits for news of what it may follow from
PHASES = ("start", "compile", "data", "step", "save", "evaluate")  # in the order of a step
UNTIMED = ("start", "compile", "save")  # which take what they take


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
    """An error of this process: for a person, as one line, and the exit status that goes with it.

    of_all: the others probably have the same one, so that process 0 need not wait for theirs.
    """

    told: str
    reason: str
    status: int
    of_all: bool


class Heard:
    """What was heard of another process, and how many seconds ago."""

    def __init__(self, link: Link):
        self.link, self.index = link, link.index
        self.silent, self.progress, self.idle = 0.0, Progress(), 0.0
        self.finished = 0  # how many trainings it has done


class Watchdog:
    """A thread that ends this process when the run is over for another, and says why.

    hosts: by process. hang_seconds: how long the process that is furthest behind may stay where it
    is, from the first step on; then it shows where that is, and the run ends.
    """

    def __init__(
        self, index: int, hosts: Sequence[str], links: Sequence[Link], hang_seconds: float
    ):
        self.index, self.hosts, self.links = index, hosts, links
        self.others = [Heard(link) for link in links]
        self.hang_seconds, self.progress, self.idle = hang_seconds, Progress(), 0.0
        self._failure: Failure | None = None
        self._begun = self._done = 0  # trainings
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

    def begin(self) -> None:
        """A training begins: all processes are needed until they have finished it."""
        self.at("start", 0)
        self._begun += 1

    def finish(self) -> None:
        """This process has done its part; its end is nobody's loss."""
        self._done = self._begun
        for link in self.links:
            link.send(finished=self._done)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as ready:
            for other in self.others:
                ready.register(other.link.connection, selectors.EVENT_READ, other)
            before, sent, failing, seen = time.monotonic(), 0.0, 0.0, self.progress
            while True:
                for key, _ in ready.select(POLL):
                    self._hear(key.data)
                    if key.data.link.closed:
                        ready.unregister(key.fileobj)
                if (now := time.monotonic()) - before < POLL:
                    continue
                # Time in which this process itself was stopped or kept busy does not count.
                passed, before = min(now - before, PULSE), now
                for other in self.others:
                    other.silent += passed
                self.idle = self.idle + passed if self.progress is seen else 0.0
                seen = self.progress
                if self._done < self._begun and (verdict := self._judge()):
                    self._end(verdict)
                if self._failure:
                    failing += passed
                    self._fail(self._failure, failing)
                if now - sent > PULSE:
                    sent = now
                    for link in self.links:
                        link.send(progress=seen, idle=self.idle)

    def _hear(self, other: Heard) -> None:
        other.silent = 0.0
        for message in other.link.receive():
            if "progress" in message:
                other.progress, other.idle = Progress(*message["progress"]), message["idle"]
            if "verdict" in message:
                self._end(Verdict(*message["verdict"]), told=self.index > 0)
            other.finished = message.get("finished", other.finished)

    def _judge(self) -> Verdict | None:
        for other in self.others:
            if other.finished >= self._begun:
                continue
            if other.link.closed:
                return Verdict([other.index], "was lost: its connection closed")
            # Until the first step other threads than its watchdog may hold the interpreter.
            if other.silent > SILENT and PHASES[other.progress.phase] != "start":
                text = f"was lost: it gave no sign of life for {SILENT:.0f} s"
                return Verdict([other.index], text)
        return self._hang() if self.index == 0 else None

    def _hang(self) -> Verdict | None:
        where = {0: (self.progress, self.idle)}
        where |= {other.index: (other.progress, other.idle) for other in self.others}
        behind = min(progress for progress, _ in where.values())
        late = {i: idle for i, (progress, idle) in where.items() if progress == behind}
        idle, phase = min(late.values()), PHASES[behind.phase]
        if idle < self.hang_seconds or phase in UNTIMED:
            return None
        others = "the others wait" if len(late) < len(where) else "all are there"
        text = f"hangs in {phase} of step {behind.step} for {idle:.0f} s, and {others}"
        limit = f"train.hang_seconds={self.hang_seconds:g} allows no more"
        return Verdict(sorted(late), f"{text}; {limit}", hangs=True)

    def _fail(self, failure: Failure, seconds: float) -> None:
        """Tells the error of this process, unless another's is heard of first."""
        if seconds < GRACE and not (failure.of_all and self.index == 0):
            return
        self._say(failure.told)
        verdict = Verdict([self.index], f"failed: {failure.reason}", failure.status)
        self._end(verdict, told=True, pass_on=True)

    def _end(self, verdict: Verdict, told: bool = False, pass_on: bool = False) -> NoReturn:
        """Ends this process, and says why unless somebody has told. Process 0 ends all others."""
        try:
            if pass_on := pass_on or self.index == 0:
                for link in self.links:
                    link.send(verdict=verdict)
            if not told:
                self._say(f"mlm-jax: {self._names(verdict.processes)} {verdict.text}")
            if verdict.hangs and self.index in verdict.processes:
                self._say("It stands here:")
                faulthandler.dump_traceback(sys.stderr)
            if pass_on:
                self._see_them_end()
            sys.stdout.flush()
        finally:
            os._exit(verdict.status)

    def _see_them_end(self) -> None:
        """JAX aborts the others, in many words, if the process that started it ends before them.

        Whoever has passed a verdict to process 0 gets it back, and need not wait for its end.
        """
        end = time.monotonic() + GRACE
        for link in self.links:
            heard = False
            while not (link.closed or heard) and (left := end - time.monotonic()) > 0:
                link.connection.settimeout(left)
                heard = any("verdict" in message for message in link.receive())

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
