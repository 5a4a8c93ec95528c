"""How much a step computes under each schedule of a pipeline, against the same step in one stage.

python benchmarks/pipeline.py [--microbatches 8 16] [--rounds 5] [--config.KEY=VALUE ...]

Four stages on four virtual devices of this machine, whose cores they share: so the CPU seconds of a
step are the work of all stages, idle ticks included, since a stage computes in those as well. The
ratio to one device without recomputation is to be compared with the formula, in forwards of the
model, backward being two: 3 m for one device, and the table of docs/parallelism.md for pipelines.
"""

import argparse
import os
import statistics
import sys

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from mlm_jax.commands import parse
from mlm_jax.data.pipeline import open_data
from mlm_jax.data.placement import Feed
from mlm_jax.door import load_config
from mlm_jax.host import keep_freed_memory
from mlm_jax.layout import Layout
from mlm_jax.step import make_steps

P, V = 4, 2
MODEL = {
    "model.n_layers": 8, "model.d_model": 256, "model.n_heads": 4, "model.seq_len": 256,
    "optimizer.schedule": "constant",
}  # fmt: skip
SCHEDULES = {  # settings, and forwards of the model by the number of microbatches
    "one device": ({"layout.preset": "single"}, lambda m: 3 * m),
    "gpipe": ({"layout.pp": P, "layout.pipeline": "gpipe"}, lambda m: 3 * (m + P - 1)),
    "gpipe, remat": (
        {"layout.pp": P, "layout.pipeline": "gpipe", "train.remat": "full"},
        lambda m: 4 * (m + P - 1),
    ),
    "circular, remat": (
        {"layout.pp": P, "layout.pipeline": "circular", "train.remat": "full"},
        lambda m: 4 * (m + (P - 1) / V),
    ),
    "1f1b": ({"layout.pp": P}, lambda m: 4 * (m + P - 1)),
    "1f1b, 2 chunks": ({"layout.pp": P, "layout.chunks": V}, lambda m: 4 * (m + (P - 1) / V)),
}


class Entry:
    """A compiled step that runs again and again on one batch."""

    def __init__(self, settings: dict, overrides: dict):
        run = load_config("quickstart", MODEL | settings | overrides)
        layout = Layout.from_config(run)
        steps = make_steps(run, layout)
        self.state, self.seconds = steps.init(), []
        self.batch = Feed(open_data(run).train, layout).batch(0)
        self.step = steps.train.lower(self.state, self.batch).compile()
        self.turn()
        self.seconds = []  # the first warms up

    def turn(self) -> None:
        begun = sum(os.times()[:2])
        self.state, _ = jax.block_until_ready(self.step(self.state, self.batch))
        self.seconds.append(sum(os.times()[:2]) - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--microbatches", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    args, overrides = parse(parser, sys.argv[1:])
    keep_freed_memory()
    print(f"jax {jax.__version__}; {' '.join(f'{k}={n}' for k, n in MODEL.items())}")
    for m in args.microbatches:
        sizes = {"train.global_batch_size": m, "train.accumulate": m}
        field = {name: Entry(s | sizes, overrides) for name, (s, _) in SCHEDULES.items()}
        for _ in range(args.rounds):
            for entry in field.values():
                entry.turn()
        print(f"\n{m} microbatches   CPU s a step   ratio (least to most)   formula")
        one = field["one device"].seconds
        for name, entry in field.items():
            ratios = [s / o for s, o in zip(entry.seconds, one, strict=True)]
            formula = SCHEDULES[name][1](m) / SCHEDULES["one device"][1](m)
            print(
                f"{name:16}{statistics.median(entry.seconds):14.2f}{statistics.median(ratios):10.2f}"
                f" ({min(ratios):.2f} to {max(ratios):.2f}){formula:12.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
