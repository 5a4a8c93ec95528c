"""The story of a run: settings, data, state; then step after step, until done or asked to stop."""

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from mlm_jax.bad_steps import BadSteps
from mlm_jax.boards import check_wandb, open_wandb
from mlm_jax.checkpoint.init_from import open_source
from mlm_jax.checkpoint.manager import Checkpoints, require_room
from mlm_jax.checkpoint.manifest import steps_in
from mlm_jax.checkpoint.workdir import check_same_run, locked, write_run
from mlm_jax.config import RunConfig
from mlm_jax.data.pipeline import Data, open_data
from mlm_jax.data.placement import Feed
from mlm_jax.distributed import (
    at,
    check_all_used,
    check_same,
    devices_here,
    lead,
    lead_says,
    start,
    together,
)
from mlm_jax.errors import CheckpointError, ConfigError, LayoutError, MlmJaxError
from mlm_jax.evaluate.examination import Examination
from mlm_jax.host import missing_xla_flags, peak_resident_bytes
from mlm_jax.layers.watch import as_row
from mlm_jax.layers.weight import weight_names
from mlm_jax.layout import Layout
from mlm_jax.metrics import MetricsLog, NoMetricsLog, flops_per_step, peak_flops
from mlm_jax.profiling import Profiler, Span
from mlm_jax.report import write_report
from mlm_jax.step import Steps, TrainState, make_steps
from mlm_jax.stop import AgreedStop, StopSignals, agreed
from mlm_jax.terminal import Terminal

log = logging.getLogger(__name__)

Metrics = Mapping[str, Any]  # of one step, see step.train_step


class Outcome(NamedTuple):
    """stopped: by a signal before all was done. saved: the step of the newest checkpoint, or 0."""

    stopped: bool
    saved: int
    report: Path


def train(
    run: RunConfig, workdir: Path | str, stop: StopSignals | None = None,
    profile: Span | None = None,
) -> Outcome:  # fmt: skip
    """Trains until run.train.steps, or resumes where the newest checkpoint of workdir stands.

    stop: signals caught since before this call; None: from here on.
    profile: steps to trace into workdir/profile.

    Raises ConfigError, LayoutError, DataError or CheckpointError before anything is compiled, and
    MlmJaxError where the run fails: steps that are not finite, or files that cannot be written.
    Over several processes an error is not raised: it is told, and ends all of them.
    """
    start(run.train.hang_seconds)
    with together(), StopSignals() if stop is None else nullcontext(stop) as own:
        return train_here(run, Path(workdir), own, profile)


def train_here(run: RunConfig, workdir: Path, own: StopSignals, profile: Span | None) -> Outcome:
    """What this process does of `train`."""
    last = run.train.steps
    check_wandb(run)
    if profile:
        profile.check(0, last)  # before there is a folder
    with told_of_files(workdir):
        layout, asked = Layout.from_config(run), agreed(own)
        check_all_used(layout.mesh)
        check_xla(run.train.xla, layout)
        data = open_data(run)
        fingerprint = dict(data.fingerprint)
        check_same(run.to_dict() | {"fingerprint": fingerprint})
        lead_says(lambda: check_same_run(workdir, run, data.tokenizer, fingerprint))
        fresh = lead_says(lambda: not steps_in(workdir / "checkpoints"))
        source = open_source(run, data.tokenizer) if run.init_from and fresh else None
        steps = make_steps(run, layout)
        check_memory(steps.abstract, layout)
        lead_says(lambda: require_room(workdir, steps.abstract, run.checkpoint.keep))
        lock = locked(workdir) if lead() else nullcontext()
        with lock, Checkpoints(workdir, run.checkpoint) as checkpoints:
            # None came in between.
            lead_says(lambda: check_same_run(workdir, run, data.tokenizer, fingerprint))
            done = checkpoints.whole or 0
            if done > last:
                raise CheckpointError(f"{workdir} is at step {done}, beyond train.steps={last}")
            if profile:
                profile.check(done, last)
            lead_says(lambda: write_run(workdir, run, data.tokenizer, fingerprint))
            with rows_of(run, workdir, done) as rows:
                if done:
                    state = checkpoints.restore(steps.abstract, done)
                elif source:
                    state = steps.begin(source.params(run.model, layout))
                else:
                    state = steps.init()
                story = Story(run, layout, data, steps, rows, checkpoints, workdir, asked)
                story.tell(state, done, profile)
            at("save", last)  # which the end of Checkpoints waits for
        report = write_report(workdir) if lead() else workdir / "report.html"
        return Outcome(not story.finished, story.saved, report)


def rows_of(run: RunConfig, workdir: Path, done: int) -> MetricsLog | NoMetricsLog:
    """Where rows of metrics go: of several processes only the lead writes."""
    if not lead():
        return NoMetricsLog()
    boards, terminal = open_wandb(run, workdir), Terminal(run.train.steps)
    return MetricsLog(workdir, resume_step=done, terminal=terminal, boards=boards)


@contextmanager
def told_of_files(workdir: Path) -> Iterator[None]:
    """A file of the run that cannot be read or written is a failure with one message."""
    try:
        yield
    except (ConnectionError, TimeoutError):  # of the terminal, or of a board
        raise
    except OSError as why:
        free = shutil.disk_usage(workdir).free / 2**30 if workdir.exists() else 0
        raise MlmJaxError(
            f"{why.filename or workdir}: {why.strerror or why}; {free:.3g} GiB are free there."
            " Checkpoints are as they were: the same command goes on from the newest"
        ) from why


class Story:
    """The loop, and what it remembers between two rows of metrics."""

    def __init__(
        self, run: RunConfig, layout: Layout, data: Data, steps: Steps,
        rows: MetricsLog | NoMetricsLog, checkpoints: Checkpoints, workdir: Path,
        stop: StopSignals | AgreedStop,
    ):  # fmt: skip
        self.run, self.layout, self.data, self.steps = run, layout, data, steps
        self.rows, self.checkpoints, self.workdir, self.stop = rows, checkpoints, workdir, stop
        self.examination = Examination(run, layout, data, steps, rows, stop)
        self.bad_steps = BadSteps(run.train.bad_steps_limit, weight_names(steps.abstract.params))
        self.pending: list[tuple[int, Metrics]] = []  # of steps that nobody has waited for
        self.settled: list[Metrics] = []  # of the other steps since the last row
        self.feed, self.sizes = Feed(data.train, layout), data.train.sizes
        self.step_fns: dict[int, Any] = {}  # compiled, by the size of a batch
        self.saved, self.finished = 0, False  # newest checkpoint; whether nothing is left to do
        self.mark = self.data_wait = 0.0  # start of the time that the next row covers

    def tell(self, state: TrainState, start: int, profile: Span | None = None) -> None:
        """Steps start + 1 to the last, or to a signal."""
        t, last = self.run.train, self.run.train.steps
        self.saved = start
        self.tell_damage(start)
        if start and self.is_due(start, t.eval_every):
            self.examine(state.params, start)  # what a kill or a signal left undone
        if not self.stop and start < last:
            self.step_fn(state, start)  # compiles, which may take long
        if self.stop or start == last:
            return  # nothing new to save
        profiler = Profiler(self.workdir / "profile")
        profile = profile if lead() else None
        self.mark = time.perf_counter()
        for step, batch in enumerate(self.batches(start, last), start + 1):
            if profile and step == profile.first:
                with self.paused():
                    profiler.start(step)
            step_fn = self.step_fn(state, step - 1)
            at("step", step)
            state, metrics = step_fn(state, batch)  # returns at once; the device works on
            self.pending.append((step, metrics))
            if profile and step == profile.last:
                self.end_profile(profiler, step, step_fn)
            if self.is_due(step, t.log_every):
                self.write_train_row(step)
            if self.is_due(step, self.run.checkpoint.every):
                self.save(step, state)
            if self.is_due(step, t.eval_every):
                self.examine(state.params, step)
            if self.stop.after_step():
                if profiler.first:
                    self.end_profile(profiler, step, step_fn)
                if self.pending or self.settled:
                    self.write_train_row(step)
                return self.save(step, state)

    def end_profile(self, profiler: Profiler, step: int, step_fn: Any) -> None:
        with self.paused():
            profiler.stop(step, step_fn)

    def is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.run.train.steps

    def tell_damage(self, start: int) -> None:
        for problem in self.checkpoints.damaged:
            self.rows.write("event", start, event="damaged checkpoint", problem=problem)
            log.warning("%s; set aside as *.damaged, going on from step %d", problem, start)

    def save(self, step: int, state: TrainState) -> None:
        """Begins a checkpoint of good steps only; it is written while the run goes on."""
        if step > self.saved:
            at("save", step)
            with self.paused():
                self.settle()
                self.bad_steps.check(self.saved)
                self.checkpoints.save(step, state)
            self.saved = step

    def step_fn(self, state: TrainState, k: int) -> Any:
        """The train step compiled for the size of batch k, when that is first seen."""
        size = self.sizes.size(k)
        if size not in self.step_fns:
            with self.paused():
                self.step_fns[size] = self.compiled(state, k)
        return self.step_fns[size]

    def compiled(self, state: TrainState, k: int) -> Any:
        """The train step for the shape of batch k; what it takes is written down."""
        at("compile", k + 1)
        begun = time.perf_counter()
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        size = self.sizes.size(k)
        self.rows.write(
            "event",
            k,
            event="compiling",
            parameters=parameters,
            batch_size=size,
            layout=self.layout.sizes,
        )
        step_fn = self.steps.train.lower(state, self.feed.batch(k)).compile()
        memory = step_fn.memory_analysis()
        self.rows.write(
            "event", k, event="compiled", seconds=time.perf_counter() - begun,
            parameters=parameters, batch_size=size,
            devices=self.layout.mesh.size, device_kind=jax.devices()[0].device_kind,
            state_gib=memory.argument_size_in_bytes / 2**30,
            temporary_gib=memory.temp_size_in_bytes / 2**30,
        )  # fmt: skip
        return step_fn

    def batches(self, start: int, stop: int) -> Iterator[dict[str, jax.Array]]:
        """The batches of steps start + 1 to stop, on the devices; counts the seconds waited."""
        with closing(self.feed.ahead(start, stop)) as ahead:
            for step in range(start + 1, stop + 1):
                at("data", step)
                begun = time.perf_counter()
                batch = next(ahead)
                self.data_wait += time.perf_counter() - begun
                yield batch

    def write_train_row(self, step: int) -> None:
        """One row for the steps since the last; waits for them."""
        self.settle()
        metrics, n, seconds = self.settled, len(self.settled), time.perf_counter() - self.mark
        good = [m for m in metrics if m["applied"]] or metrics
        weight = sum(m["weight"] for m in good)
        sequences, T = self.sizes.start(step) - self.sizes.start(step - n), self.run.model.seq_len
        flops_per_s = flops_per_step(self.run.model, sequences) / seconds / self.layout.mesh.size
        peak = peak_flops(jax.devices()[0].device_kind)
        self.rows.write(
            "train", step,
            loss=sum(m["loss"] * m["weight"] for m in good) / max(weight, 1),
            grad_norm=metrics[-1]["grad_norm"], learning_rate=metrics[-1]["learning_rate"],
            tokens=self.sizes.start(step) * T, step_time_s=seconds / n,
            data_wait_s=self.data_wait / n, tokens_per_s=sequences * T / seconds,
            tflops_per_device=flops_per_s / 1e12,
            mfu=flops_per_s / peak if peak else None, memory_gib=peak_memory_gib(),
            **as_row(metrics[-1].get("watched", {})),
        )  # fmt: skip
        self.bad_steps.check(self.saved)
        self.checkpoints.check()
        self.settled, self.data_wait, self.mark = [], 0.0, time.perf_counter()

    def settle(self) -> None:
        """Waits for the pending steps. Those that were not applied get a row each."""
        for step, metrics in jax.device_get(self.pending):
            self.settled.append(metrics)
            if bad := self.bad_steps.look(step, metrics):
                self.rows.write("event", step, event="bad step", **bad)
                told = "step %d was not applied: loss %g, gradient norm %g"
                log.warning(told, step, bad["loss"], bad["grad_norm"])
        self.pending = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not time of steps."""
        jax.block_until_ready(self.pending)
        begun = time.perf_counter()
        yield
        self.mark += time.perf_counter() - begun

    def examine(self, params: nnx.State, step: int) -> None:
        """What the run is worth by now; a signal ends it, and the next start comes back here."""
        with self.paused():
            last = step == self.run.train.steps
            complete = self.examination.hold(params, step, last)
            self.finished = last and complete
            if lead():
                write_report(self.workdir)


def check_xla(preset: str, layout: Layout) -> None:
    """Raises ConfigError where train.xla does nothing: without GPUs, or set too late."""
    if preset != "default" and not layout.on_gpu():
        raise ConfigError(f"train.xla={preset!r} does nothing without GPUs; leave it out")
    if missing := missing_xla_flags(preset):
        raise ConfigError(
            f"train.xla={preset!r} comes too late for this process: XLA_FLAGS lacks"
            f" {', '.join(missing)}; call mlm_jax.host.set_xla_flags({preset!r}) before jax starts"
        )


def check_memory(abstract: TrainState, layout: Layout) -> None:
    """Raises LayoutError where weights, moments and gradients alone are more than there is."""
    gradients = layout.placed(abstract.params, of_optimizer=layout.zero == 2)
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves((abstract, gradients))
    )
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    where = f"a device has {(limit or 0) / 2**30:.1f}"
    if device.platform == "cpu":  # virtual devices share the memory of the machine
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        held *= devices_here(layout.mesh)
        where = f"this machine has {limit / 2**30:.1f}"
    if limit and held > limit:
        raise LayoutError(
            f"weights, gradients and moments take {held / 2**30:.1f} GiB, and {where}; split them"
            " over more devices (layout.fsdp, layout.tp), or take a smaller model"
        )


def peak_memory_gib() -> float | None:
    """The most that any device of this process has held; on a CPU, the most that it has itself.

    None where neither is known.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    most: int | None = max((s.get("peak_bytes_in_use", 0) for s in stats), default=0)
    if jax.default_backend() == "cpu":
        most = peak_resident_bytes()
    return most / 2**30 if most else None
