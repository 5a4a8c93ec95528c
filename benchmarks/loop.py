"""What the loop around the compiled step costs, and how long the step takes to compile.

python benchmarks/loop.py [--steps 60] [--config.KEY=VALUE ...]

Runs the quickstart's shapes through `mlm_jax.loop`, waiting for each step, so that a second is
either inside the compiled step or outside of it; evaluations and checkpoints are not counted. Then
compiles the same step with 8 and with 96 layers, three times each, taking turns.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

import mlm_jax.loop
from mlm_jax.commands import parse
from mlm_jax.config import RunConfig
from mlm_jax.data.pipeline import open_data
from mlm_jax.data.placement import Feed
from mlm_jax.door import load_config
from mlm_jax.host import keep_freed_memory
from mlm_jax.layout import Layout
from mlm_jax.metrics import read_rows
from mlm_jax.step import make_steps


class TimedStory(mlm_jax.loop.Story):
    """A loop that waits for each step and adds up the seconds inside."""

    inside: list[float]

    def compiled(self, state, start):
        step_fn, TimedStory.inside = super().compiled(state, start), []

        def timed(state, batch):
            begun = time.perf_counter()
            done = jax.block_until_ready(step_fn(state, batch))
            self.inside.append(time.perf_counter() - begun)
            return done

        return timed


def loop_share(run: RunConfig) -> tuple[float, float]:
    """Seconds of a step inside the compiled program, and in all."""
    mlm_jax.loop.Story = TimedStory
    with tempfile.TemporaryDirectory() as workdir:
        mlm_jax.loop.train(run, workdir)
        rows = read_rows(Path(workdir) / "metrics.jsonl")
    every = run.train.log_every
    total = [r["step_time_s"] for r in rows if r["kind"] == "train"][1:]  # the first warms up
    return statistics.mean(TimedStory.inside[every:]), statistics.mean(total)


def compile_seconds(run: RunConfig) -> tuple[float, float]:
    """Seconds to trace and lower, and to compile."""
    layout = Layout.from_config(run)
    steps = make_steps(run, layout)
    batch = Feed(open_data(run).train, layout).batch(0)
    begun = time.perf_counter()
    lowered = steps.train.lower(steps.abstract, batch)
    traced = time.perf_counter()
    lowered.compile()
    return traced - begun, time.perf_counter() - traced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    args, overrides = parse(parser, sys.argv[1:])
    keep_freed_memory()
    seldom = {"train.eval_every": 10**6, "train.eval_batches": 1, "checkpoint.every": 10**6}
    run = load_config("quickstart", seldom | {"train.steps": args.steps} | overrides)
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__} on {jax.device_count()} x {device}, {run.model}")
    inside, total = loop_share(run)
    print(f"step {total * 1e3:.1f} ms, of it outside the compiled step {1 - inside / total:.2%}")
    jax.config.update("jax_enable_compilation_cache", False)
    seconds: dict[int, list] = {8: [], 96: []}
    for _ in range(3):
        for n_layers, measured in seconds.items():
            deeper = load_config("quickstart", overrides | {"model.n_layers": n_layers})
            measured.append(compile_seconds(deeper))
    for n_layers, measured in seconds.items():
        trace, compiled = (statistics.median(column) for column in zip(*measured, strict=True))
        print(f"{n_layers} layers: {trace:.2f} s to trace, {compiled:.2f} s to compile")


if __name__ == "__main__":
    main()
