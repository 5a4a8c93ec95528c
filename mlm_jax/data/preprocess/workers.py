"""Parts of the input, encoded by this process or by several."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from mlm_jax.data.preprocess.encoding import Counts, Recipe, write_part
from mlm_jax.data.preprocess.inputs import Part
from mlm_jax.data.preprocess.progress import Progress
from mlm_jax.errors import MlmJaxError

Done = tuple[Part, Counts, str]
# A part, and the prefixes that it is written under.
Task = tuple[Part, Sequence[str]]

ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


def here(tasks: Iterable[Task], recipe: Recipe, progress: Progress) -> Generator[Done, None, None]:
    """One part after the other in this process."""

    def tick(*counts: int) -> None:
        progress.add(*counts)
        progress.show()

    for part, prefixes in tasks:
        with one_thread():
            done = part, *write_part(part, recipe, prefixes, tick)
        yield done


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For the tokenizers of this process."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def in_processes(
    tasks: Iterable[Task], workers: int, recipe: Recipe, progress: Progress
) -> Generator[Done, None, None]:
    """Parts as they are finished, in any order, by processes of one thread each.

    When this returns, or raises, they have ended; they also end if this process is killed.
    """
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 3)
    ours, theirs = context.Pipe()
    setup = (recipe, counters, theirs)
    pool = ProcessPoolExecutor(workers, context, initializer=set_up, initargs=setup)
    running: dict[Future, Part] = {}

    def finished() -> Iterator[Done]:
        for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), *future.result()
        with counters.get_lock():
            counts, counters[:] = counters[:], [0, 0, 0]
        progress.add(*counts)
        progress.show()

    try:
        for task in tasks:
            with signals_held():
                running[pool.submit(work, *task)] = task[0]
            while len(running) >= 2 * workers:  # a stream is read no further than this ahead
                yield from finished()
        while running:
            yield from finished()
    except BrokenProcessPool:
        progress.show()
        files = dict.fromkeys(piece.file for part in running.values() for piece in part.pieces)
        raise MlmJaxError(
            f"a worker ended while {', '.join([*files][:9])} was read, as it does when the system"
            " has no memory left; with fewer --workers the same command goes on from here"
        ) from None
    finally:
        ours.close()
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Processes started now never hear Ctrl-C or SIGTERM, which are often sent to all: it is this
    process that ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In a worker

setting: tuple[Recipe, Callable[..., None]]  # of this worker


def set_up(recipe: Recipe, counters: Any, parent: Connection) -> None:
    global setting
    os.environ.update(ONE_THREAD)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()

    def tick(*counts: int) -> None:
        with counters.get_lock():
            counters[:] = [a + b for a, b in zip(counters, counts, strict=True)]

    setting = recipe, tick


def end_with(parent: Connection) -> None:
    """Once it closes its end of the pipe, by itself or because it was killed."""
    multiprocessing.connection.wait([parent])
    os._exit(1)


def work(part: Part, prefixes: Sequence[str]) -> tuple[Counts, str]:
    recipe, tick = setting
    return write_part(part, recipe, prefixes, tick)
