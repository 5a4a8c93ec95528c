"""What a device holds in a train step under each layout, by XLA's memory analysis and the textbook.

python benchmarks/memory.py [--layouts dp zero1 ...] [--config.KEY=VALUE ...]

One GPT in float32 with full recomputation, on 8 virtual devices; nothing is run. Columns, in MiB a
device: `state`, weights and Adam's moments between steps, and `work`, all that comes and goes
within one; each as compiled, and by the formula:

state   4 + 8 bytes a parameter, of the share that the layout gives a device.
work    gradients, 4 bytes a parameter of the same share, from ZeRO-2 on of that of the optimizer
        state; twice, the sum over microbatches and the newest;
        with several chunks a stage, weights and gradients once more, in the order of chunks;
        where these are of split weights, a layer's and the table's whole, and their gradients;
        inputs of layers, s b h values each, b sequences of s tokens on a device, split by tp under
        sequence parallelism, and by cp (Korthikanti et al. 2022, table 2: full recomputation); of
        a pipeline the inputs of its ticks instead, under 1f1b those of 2 p v - 1 microbatches;
        of the layer at hand what the same table has without recomputation: 4 s b h values, split
        by tp with the sequence, and 12 s b h / t, twice, for their gradients; and twice the scores
        of attention, a s^2 b / t values, of which causality leaves half. Without dropout, and in
        float32 (in the table, 2 bytes). gpipe and circular compute a whole tick again: its layers
        are at hand together. Or, where that is more, the logits and their gradient.

XLA's CPU backend orders and reuses buffers in another way than its GPU backend, and reduces a
gradient whole where that one scatters it. So `work` is what a layout changes, not what a GPU holds;
where it is more than 10 % off the formula, the last column says why.
"""

import argparse
import math
import os
import sys
from typing import Any, NamedTuple

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from mlm_jax.commands import parse
from mlm_jax.config import RunConfig
from mlm_jax.door import load_config
from mlm_jax.layout import Layout, bytes_held
from mlm_jax.step import Steps, make_steps

MIB = 2**20
MODEL = {
    "model.n_layers": 8, "model.d_model": 256, "model.n_heads": 8, "model.seq_len": 512,
    "model.vocab_size": 2048, "model.init_std": 0.02, "train.remat": "full",
    "train.global_batch_size": 64, "train.accumulate": 4, "optimizer.schedule": "constant",
}  # fmt: skip
STAGES = {"layout.pp": 4, "layout.dp": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {"layout.preset": "single", "train.global_batch_size": 8},
    "dp": {"layout.dp": 8},
    "zero1": {"layout.preset": "zero1"},
    "zero2": {"layout.preset": "zero2"},
    "zero3": {"layout.preset": "zero3"},
    "tp": {"layout.tp": 8},
    "tp_sp": {"layout.preset": "tp_sp"},
    "cp": {"layout.cp": 8},
    "cp_all_gather": {"layout.cp": 8, "layout.cp_attention": "all_gather"},
} | {
    f"{schedule}, {m}": STAGES
    | {"layout.pipeline": schedule, "train.accumulate": m, "train.global_batch_size": 4 * m}
    for schedule in ("gpipe", "circular", "1f1b")
    for m in (8, 16, 32)
}


WHY = {  # where XLA:CPU is more than 10 % off, read from its report of buffers
    "tp": "summands of all-reduces beside their sums: 5 s b h more",
    "tp_sp": "sequences gathered, or not scattered yet: 7 whole s b h",
    "cp_all_gather": "keys and values of a layer whole, and their gradients",
    "circular": "parts of weights and gradients under way between stages",
}


class Bytes(NamedTuple):
    state: float
    work: float


def compiled(run: RunConfig, layout: Layout, steps: Steps) -> Bytes:
    """As XLA allocates it."""
    B, T = run.train.global_batch_size, run.model.seq_len
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    rows = layout.sharding("batch", None)
    batch = {k: jax.ShapeDtypeStruct((B, T), d, sharding=rows) for k, d in kinds.items()}
    memory = steps.train.lower(steps.abstract, batch).compile().memory_analysis()
    batch_bytes = sum(4 * math.prod(rows.shard_shape(x.shape)) for x in batch.values())
    return Bytes(memory.argument_size_in_bytes - batch_bytes, memory.temp_size_in_bytes)


def textbook(run: RunConfig, layout: Layout, steps: Steps) -> Bytes:
    """As the formulas in this file's docstring have it."""
    sizes, cfg = dict(layout.mesh.shape), run.model
    p, v, t, m = sizes["pp"], layout.chunks, sizes["tp"], run.train.accumulate
    schedule = layout.pipeline if p > 1 else None
    sequences = run.train.microbatch // (sizes["dp"] * sizes["fsdp"])
    tokens = sequences * cfg.seq_len // sizes["cp"]
    values = 4 * tokens * cfg.d_model  # s b h, in bytes
    layer_input = values / (t if layout.axes("residual_seq") != layout.axes("seq") else 1)
    layers = cfg.n_layers // p
    inputs = {
        None: layers, "1f1b": 2 * p * v - 1 + layers // v, "gpipe": m + p - 1,
        "circular": m * v + p - 1,
    }[schedule]  # fmt: skip
    layer = 4 * layer_input + 12 * values / t
    scores = 2 * 4 * cfg.n_heads * tokens * cfg.seq_len / t / 2
    at_hand = layer * (1 + (layers // v if schedule in ("gpipe", "circular") else 1)) + scores
    logits = 2 * 4 * tokens * cfg.padded_vocab / t
    exchanged = 2 * bytes_held(steps.abstract.params["blocks"]) if v > 1 else 0
    work = gradients(layout, steps) + exchanged + inputs * layer_input + max(at_hand, logits)
    return Bytes(bytes_held(steps.abstract), work)


def gradients(layout: Layout, steps: Steps) -> float:
    params, sizes = steps.abstract.params, layout.mesh.shape
    both = 2 * bytes_held(layout.placed(params, of_optimizer=layout.zero == 2))
    kinds = (sizes["fsdp"] > 1) + (sizes["fsdp"] > 1 or layout.zero == 2)  # weights, gradients
    table = jax.tree.leaves(params["embedding"]["tokens"])[0]
    layer = sum(x.size / x.shape[0] for x in jax.tree.leaves(params["blocks"]))
    return both + kinds * 4 * (table.size + layer) / sizes["tp"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    args, overrides = parse(parser, sys.argv[1:])
    print(f"jax {jax.__version__}; {' '.join(f'{k}={n}' for k, n in MODEL.items())}")
    print(f"\n{'':14}{'mesh':>14} {'state':>8}{'formula':>9}{'work':>9}{'formula':>9}{'ratio':>7}")
    for name in args.layouts:
        run = load_config("quickstart", MODEL | LAYOUTS[name] | overrides)
        layout = Layout.from_config(run)
        steps = make_steps(run, layout)
        found, said = compiled(run, layout, steps), textbook(run, layout, steps)
        state, work = f"{found.state / MIB:8.1f}{said.state / MIB:9.1f}", found.work / MIB
        ratio = (found.state + found.work) / (said.state + said.work)
        print(
            f"{name:14}{layout.sizes:>14} {state}{work:9.1f}{said.work / MIB:9.1f}{ratio:7.2f}"
            f"  {WHY.get(name.partition(',')[0], '') if abs(ratio - 1) > 0.1 else ''}".rstrip(),
            flush=True,
        )


if __name__ == "__main__":
    main()
