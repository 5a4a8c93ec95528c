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
from pathlib import Path
from typing import Any

from mlm_jax.data.preprocess.encoding import Counts, Encoder, Recipe, write_part
from mlm_jax.data.preprocess.inputs import Part
from mlm_jax.data.preprocess.progress import Progress
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.errors import MlmJaxError

Done = tuple[Part, Counts, list[str]]
# A part, and the prefixes that it is written under.
Task = tuple[Part, Sequence[str]]

ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


class Stopped(KeyboardInterrupt):
    """Asked to stop. Finished parts are kept: the same call goes on from there."""


def here(
    tasks: Iterable[Task], recipe: Recipe, encoder: Encoder, progress: Progress,
    pause: Callable[[], None],
) -> Generator[Done, None, None]:  # fmt: skip
    """One part after the other in this process; pause is called often, and may raise Stopped."""

    def tick(*counts: int) -> None:
        progress.add(*counts)
        pause()

    for part, prefixes in tasks:
        with one_thread(), in_one_message(part):
            done = part, *write_part(part, recipe, encoder, prefixes, tick)
        yield done


def in_processes(
    tasks: Iterable[Task], workers: int, recipe: Recipe, tokenizer: Path, progress: Progress,
    pause: Callable[[], None],
) -> Generator[Done, None, None]:  # fmt: skip
    """Parts as they are finished, in any order, by processes of one thread each.

    When this returns, or raises, they have ended; they also end if this process is killed.
    """
    context = multiprocessing.get_context("spawn")
    halt, counters = context.Event(), context.Array("q", 3)
    setup = (recipe, tokenizer, halt, counters)
    pool = ProcessPoolExecutor(workers, context, initializer=set_up, initargs=setup)
    running: dict[Future, Part] = {}

    def finished() -> Iterator[Done]:
        for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), *future.result()
        with counters.get_lock():
            counts, counters[:] = counters[:], [0, 0, 0]
        progress.add(*counts)
        pause()

    try:
        for part, prefixes in tasks:
            with one_thread(), signals_held():
                running[pool.submit(work, part, prefixes)] = part
            while len(running) >= 2 * workers:  # a stream is copied no further than this ahead
                yield from finished()
        while running:
            yield from finished()
    except BrokenProcessPool:
        pause()
        raise MlmJaxError(
            f"a worker ended while {', '.join({p.file for p in running.values()})} was read, as it"
            " does when the system has no memory left; with fewer --workers, or a lower"
            " --max_document_bytes, the same command goes on from here"
        ) from None
    finally:
        halt.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For tokenizers in this process and in those that it starts."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Processes started now never hear Ctrl-C or SIGTERM, which are often sent to all: it is this
    process that ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def in_one_message(part: Part) -> Iterator[None]:
    """All that the libraries of tokenizers raise is a bare Exception."""
    try:
        yield
    except (MlmJaxError, OSError):  # which tell by themselves what happened
        raise
    except Exception as error:
        raise MlmJaxError(f"{part.file}: {type(error).__name__}: {error}") from error


# In a worker

setting: tuple[Recipe, Encoder, Callable[..., None]]  # of this worker


def set_up(recipe: Recipe, tokenizer: Path, halt: Any, counters: Any) -> None:
    global setting
    threading.Thread(target=end_with_parent, daemon=True).start()

    def tick(*counts: int) -> None:
        if halt.is_set():
            raise MlmJaxError("halted")  # nobody waits for it
        with counters.get_lock():
            counters[:] = [a + b for a, b in zip(counters, counts, strict=True)]

    encoder = Encoder(load_tokenizer(tokenizer), recipe.append_eod, recipe.split_sentences)
    setting = recipe, encoder, tick


def end_with_parent() -> None:
    """However the parent ended: its queue alone would let us wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def work(part: Part, prefixes: Sequence[str]) -> tuple[Counts, list[str]]:
    recipe, encoder, tick = setting
    with in_one_message(part):
        return write_part(part, recipe, encoder, prefixes, tick)
