"""The story of a run: settings, data, state; then step after step, until done or asked to stop."""

import functools
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from mlm_jax.boards import check_wandb, open_wandb
from mlm_jax.checkpoint.manager import Checkpoints
from mlm_jax.checkpoint.workdir import check_same_run, write_run
from mlm_jax.config import RunConfig
from mlm_jax.data.pipeline import Data, open_data, place
from mlm_jax.distributed import StopSignals, refuse_several
from mlm_jax.errors import CheckpointError, LayoutError, MlmJaxError
from mlm_jax.evaluate.completions import PROMPTS, complete
from mlm_jax.host import peak_resident_bytes
from mlm_jax.inference.engine import generate
from mlm_jax.layers.watch import as_row
from mlm_jax.layout import Layout
from mlm_jax.metrics import MetricsLog, flops_per_step, peak_flops
from mlm_jax.profiling import Profiler, Span
from mlm_jax.report import write_report
from mlm_jax.step import Steps, TrainState, make_steps
from mlm_jax.terminal import Terminal


class Outcome(NamedTuple):
    """stopped: by a signal before the last step. saved: the step of the newest checkpoint, or 0."""

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

    Raises ConfigError, LayoutError, DataError or CheckpointError before anything is written, and
    MlmJaxError when too many steps in a row were not finite.
    """
    workdir, last = Path(workdir), run.train.steps
    refuse_several()
    check_wandb(run)
    if profile:
        profile.check(0, last)  # before there is a folder
    with StopSignals() if stop is None else nullcontext(stop) as stop:
        layout = Layout.from_config(run)
        data = open_data(run)
        check_same_run(workdir, run, data.tokenizer)
        steps = make_steps(run, layout)
        check_memory(steps.abstract, layout)
        with Checkpoints(workdir, run.checkpoint) as checkpoints:
            start = checkpoints.latest() or 0
            if start > last:
                raise CheckpointError(f"{workdir} is at step {start}, beyond train.steps={last}")
            if profile:
                profile.check(start, last)
            write_run(workdir, run, data.tokenizer)
            boards = open_wandb(run, workdir)
            with MetricsLog(
                workdir, resume_step=start, terminal=Terminal(last), boards=boards
            ) as rows:
                state = checkpoints.restore(steps.abstract) if start else steps.init()
                story = Story(run, layout, data, steps, rows, checkpoints, workdir)
                saved = story.tell(state, start, stop, profile)
        return Outcome(saved < last, saved, write_report(workdir))


class Story:
    """The loop, and what it remembers between two rows of metrics."""

    def __init__(
        self, run: RunConfig, layout: Layout, data: Data, steps: Steps, rows: MetricsLog,
        checkpoints: Checkpoints, workdir: Path,
    ):  # fmt: skip
        self.run, self.layout, self.data, self.steps = run, layout, data, steps
        self.rows, self.checkpoints, self.workdir = rows, checkpoints, workdir
        self.pending: list[dict[str, jax.Array]] = []  # metrics of steps since the last row
        self.bad_in_a_row = 0
        self.mark = self.data_wait = 0.0  # start of the time that the next row covers

    def tell(
        self, state: TrainState, start: int, stop: StopSignals, profile: Span | None = None
    ) -> int:
        """Steps start + 1 to the last, or to a signal. Returns the last step saved."""
        t, last = self.run.train, self.run.train.steps
        if start == last:
            if not self.rows.has("completions"):  # killed after its last checkpoint
                self.finish(state.params, last)
            return last
        step_fn = None if stop else self.compiled(state, start)
        if stop or step_fn is None:  # nothing to save yet
            return start
        profiler = Profiler(self.workdir / "profile")
        self.mark = time.perf_counter()
        for step, batch in enumerate(self.batches(start, last), start + 1):
            if profile and step == profile.first:
                with self.paused():
                    profiler.start(step)
            state, metrics = step_fn(state, batch)  # returns at once; the device works on
            self.pending.append(metrics)
            ends = step == last or bool(stop)
            if profiler.first and (ends or (profile and step == profile.last)):
                with self.paused():
                    profiler.stop(step, step_fn)
            if ends or step % t.log_every == 0:
                self.write_train_row(step)
            if step == last or (step % t.eval_every == 0 and not ends):
                with self.paused():
                    self.evaluate(state.params, step)
            if ends or step % self.run.checkpoint.every == 0:
                with self.paused():
                    self.checkpoints.save(step, state)
            if step == last:
                self.finish(state.params, step)
            if ends:
                return step
        raise AssertionError("unreachable: the last step ends the loop")

    def compiled(self, state: TrainState, start: int) -> Any:
        """The train step compiled for this run's shapes; what it takes is written down."""
        begun = time.perf_counter()
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        self.rows.write("event", start, event="compiling", parameters=parameters)
        batch = place(self.data.train.batch(start), self.layout)
        step_fn = self.steps.train.lower(state, batch).compile()
        memory = step_fn.memory_analysis()
        self.rows.write(
            "event", start, event="compiled", seconds=time.perf_counter() - begun,
            parameters=parameters,
            devices=self.layout.mesh.size, device_kind=jax.devices()[0].device_kind,
            state_gib=memory.argument_size_in_bytes / 2**30,
            temporary_gib=memory.temp_size_in_bytes / 2**30,
        )  # fmt: skip
        return step_fn

    def batches(self, start: int, stop: int) -> Iterator[dict[str, jax.Array]]:
        """The batches of steps start + 1 to stop, on the devices; counts the seconds waited."""
        ahead = self.data.train.prefetch(start, stop)
        for _ in range(start, stop):
            begun = time.perf_counter()
            batch = place(next(ahead), self.layout)
            self.data_wait += time.perf_counter() - begun
            yield batch

    def write_train_row(self, step: int) -> None:
        """One row for the steps since the last; waits for them."""
        metrics = jax.device_get(self.pending)
        n, seconds = len(self.pending), time.perf_counter() - self.mark
        for before, m in enumerate(metrics, step - n + 1):
            self.bad_in_a_row = 0 if m["applied"] else self.bad_in_a_row + 1
            if not m["applied"]:
                self.rows.write(
                    "event", before, event="bad step", loss=m["loss"], grad_norm=m["grad_norm"]
                )
        good = [m for m in metrics if m["applied"]] or metrics
        weight = sum(m["weight"] for m in good)
        flops, tokens = self.flops_per_step(), self.tokens_per_step()
        flops_per_s = flops * n / seconds / self.layout.mesh.size
        peak = peak_flops(jax.devices()[0].device_kind)
        self.rows.write(
            "train", step,
            loss=sum(m["loss"] * m["weight"] for m in good) / max(weight, 1),
            grad_norm=metrics[-1]["grad_norm"], learning_rate=metrics[-1]["learning_rate"],
            tokens=step * tokens, step_time_s=seconds / n, data_wait_s=self.data_wait / n,
            tokens_per_s=tokens * n / seconds, tflops_per_device=flops_per_s / 1e12,
            mfu=flops_per_s / peak if peak else None, memory_gib=peak_memory_gib(),
            **as_row(metrics[-1].get("watched", {})),
        )  # fmt: skip
        if self.bad_in_a_row >= self.run.train.bad_steps_limit:
            raise MlmJaxError(
                f"{self.bad_in_a_row} steps in a row, to step {step}, had a loss or gradient that"
                " is not finite; none was applied. Lower optimizer.lr, look at the data of these"
                f" steps, or raise train.bad_steps_limit={self.run.train.bad_steps_limit}"
            )
        self.pending, self.data_wait, self.mark = [], 0.0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not time of steps."""
        jax.block_until_ready(self.pending)
        begun = time.perf_counter()
        yield
        self.mark += time.perf_counter() - begun

    def evaluate(self, params: nnx.State, step: int) -> None:
        """A row of held-out loss, and a sample of text."""
        valid, B = self.data.valid, self.run.train.global_batch_size
        if valid:
            nats = weight = n_bytes = 0.0
            for k in range(min(self.run.train.eval_batches, -(-valid.n_samples // B))):
                batch = valid.batch(k, once=True)
                sums = self.steps.evaluate(params, place(batch, self.layout))
                nats, weight = nats + float(sums[0]), weight + float(sums[1])
                if self.token_bytes is not None:
                    n_bytes += float((self.token_bytes[batch["targets"]] * batch["weights"]).sum())
            bits = nats / math.log(2) / n_bytes if n_bytes else None
            self.rows.write("eval", step, eval_loss=nats / max(weight, 1), bits_per_byte=bits)
        prompt, tokenizer = self.sample_prompt(), self.data.tokenizer
        if prompt and tokenizer:
            room = self.run.model.seq_len - len(tokenizer.encode(prompt))
            if room >= 8:
                text = generate(self.model(params), [prompt], max_tokens=min(48, room), seed=step)[
                    0
                ]
                self.rows.write("event", step, event="sample", prompt=prompt, text=text)
        write_report(self.workdir)

    def finish(self, params: nnx.State, step: int) -> None:
        """With the built-in corpus: what its completions are worth, beside two simple baselines."""
        if self.data.corpus and self.run.model.seq_len >= 128:
            self.rows.write("event", step, event="baselines", **self.data.corpus.baselines)
            rows = complete(self.model(params), seed=self.run.train.seed)
            self.rows.write("event", step, event="completions", completions=rows)

    def model(self, params: nnx.State) -> Any:
        model = nnx.merge(self.steps.graphdef, params)
        model.tokenizer = self.data.tokenizer
        return model

    def sample_prompt(self) -> str | None:
        if self.data.tokenizer is None or self.data.corpus:
            return PROMPTS[0] if self.data.corpus else None
        held_out = self.data.valid or self.data.train
        return self.data.tokenizer.decode(held_out.batch(0)["tokens"][0, :16].tolist())

    @functools.cached_property
    def token_bytes(self) -> np.ndarray | None:
        """Bytes each id stands for, [vocab_size]; ids that the tokenizer does not know count 0."""
        if self.data.tokenizer is None:
            return None
        known = self.data.tokenizer.token_bytes()
        return np.pad(known, (0, self.run.model.vocab_size - len(known)))

    def tokens_per_step(self) -> int:
        return self.run.train.global_batch_size * self.run.model.seq_len

    def flops_per_step(self) -> float:
        m = self.run.model
        return flops_per_step(
            batch=self.run.train.global_batch_size, seq_len=m.seq_len, n_layers=m.n_layers,
            d_model=m.d_model, d_mlp=m.d_mlp, n_heads=m.n_heads, n_kv_heads=m.n_kv_heads,
            head_dim=m.head_dim, vocab_size=m.padded_vocab, gated=m.gated,
        )  # fmt: skip


def check_memory(abstract: TrainState, layout: Layout) -> None:
    """Raises LayoutError where weights, moments and gradients alone are more than there is."""
    gradients = layout.placed(abstract.params, of_optimizer=True)
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves((abstract, gradients))
    )
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    where = f"a device has {(limit or 0) / 2**30:.1f}"
    if device.platform == "cpu":  # virtual devices share the memory of the machine
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        held *= layout.mesh.size
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
