"""Contestants in processes of their own, who take turns."""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any, Protocol


class Entry(Protocol):
    """What a contestant's process runs."""

    facts: dict[str, Any]  # version, device, seconds to compile

    def run(self, amount: int) -> float: ...

    def memory_gib(self) -> float | None: ...


def serve(entry: Entry) -> None:
    """In a contestant's process: an amount of work on each line of stdin, JSON for each."""
    print(json.dumps(entry.facts), flush=True)
    for line in sys.stdin:
        amount, begun, cpu = int(line), time.perf_counter(), cpu_seconds()
        result = entry.run(amount)
        seconds, cpu = time.perf_counter() - begun, cpu_seconds() - cpu
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        row = {"wall_s": seconds / amount, "cpu_s": cpu / amount, "result": result}
        print(json.dumps(row | {"memory_gib": entry.memory_gib() or rss}), flush=True)


def cpu_seconds() -> float:
    """Of this process, and of those it started that have ended."""
    return sum(os.times()[:4])


class Contestant:
    def __init__(self, name: str, *arguments: str):
        command = [sys.executable, sys.argv[0], "--contestant", name, *arguments]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.name, self.rows = name, []
        self.facts = self.answer()

    def answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")

    def turn(self, amount: int) -> None:
        print(amount, file=self.process.stdin, flush=True)
        self.rows.append(self.answer())

    def median(self, key: str) -> float:
        return statistics.median(row[key] for row in self.rows)

    def leave(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def hold(
    names: list[str], arguments: list[str], rounds: int, amount: int, together: bool
) -> list[Contestant]:
    """Each contestant after its turns; those that cannot start are left out, and said to be.

    together: turns go round, so that a busy machine slows all alike; else one after the other.
    """
    field = []
    for name in names:
        try:
            field.append(Contestant(name, *arguments))
        except RuntimeError as why:
            print(f"  left out: {why}", flush=True)
            continue
        if not together:
            for _ in range(rounds):
                field[-1].turn(amount)
            field[-1].leave()
    if together:
        for _ in range(rounds):
            for one in field:
                one.turn(amount)
        for one in field:
            one.leave()
    return field


def print_ratios(field: list[Contestant], peers: list[Contestant]) -> None:
    """By how much each is faster than each peer: medians over rounds, least and most."""
    for one in (one for one in field if one not in peers):
        for peer in peers:
            for key, what in [("wall_s", "wall"), ("cpu_s", "CPU seconds")]:
                ratios = [b[key] / a[key] for a, b in zip(one.rows, peer.rows, strict=True)]
                middle = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                print(f"  {one.name} against {peer.name}, by {what}: {middle}", flush=True)


def on_gpu() -> bool:
    """Asked in another process: this one must not take the device."""
    probe = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    backend = subprocess.run(probe, capture_output=True, text=True).stdout.strip()
    return backend not in ("cpu", "")
