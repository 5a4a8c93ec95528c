"""Law 1: any layout, same numbers. Training under a layout equals training on one device.

float64 proves it: nothing but the order of sums may differ, and errors are those of rounding.

float32, which runs use, is held to 1e-5, with Adam's epsilon at 1e-6. At 1e-8 the losses agree as
well, but Adam divides a gradient by its own size: where that is rounding, so is the direction the
weight moves in. The bias of the keys, which softmax cancels and whose gradient is 0 but for
rounding, ends up to 2e-4 apart then, and a handful of 130,000 other weights too.
"""

import math
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from functools import cache
from itertools import combinations, product
from typing import NamedTuple

import jax
import numpy as np
import pytest

from mlm_jax.layout import MESH_AXES
from mlm_jax.step import make_steps
from tests.conftest import STYLES, named, place, tiny_batch, tiny_layout, tiny_run

STEPS = 5
SP = {"sequence_parallel": True}
INTERLEAVED = {"chunks": 2}
CIRCULAR = {"pipeline": "circular"}
GPIPE = {"pipeline": "gpipe"}
GATHER = {"cp_attention": "all_gather"}
LAYOUTS = {
    # each axis alone
    "dp": {"dp": 8},
    "zero1": {"dp": 8, "zero": 1},
    "zero2": {"dp": 8, "zero": 2},
    "fsdp": {"fsdp": 8},
    "tp": {"tp": 4},
    "tp_sp": {"tp": 4, **SP},
    "cp": {"cp": 8},
    "cp_gather": {"cp": 4, **GATHER},
    "pp": {"pp": 4},
    "pp_gpipe": {"pp": 4, **GPIPE},
    "pp_circular": {"pp": 2, **CIRCULAR},
    "pp_interleaved": {"pp": 2, **INTERLEAVED},
    # pairs
    "dp_fsdp": {"dp": 2, "fsdp": 4, "zero": 1},  # hybrid
    "dp_tp": {"dp": 2, "tp": 4, "zero": 2},
    "dp_tp_sp": {"dp": 4, "tp": 2, **SP},
    "dp_cp": {"dp": 2, "cp": 4},
    "dp_cp_gather": {"dp": 4, "cp": 2, **GATHER},
    "fsdp_tp": {"fsdp": 2, "tp": 4},
    "fsdp_tp_sp": {"fsdp": 4, "tp": 2, **SP},
    "fsdp_cp": {"fsdp": 2, "cp": 4},
    "cp_tp": {"cp": 2, "tp": 4},
    "cp_tp_sp": {"cp": 4, "tp": 2, **SP},
    "pp_dp": {"pp": 2, "dp": 4},
    "pp_dp_gpipe": {"pp": 4, "dp": 2, "zero": 1, **GPIPE},
    "pp_dp_interleaved": {"pp": 2, "dp": 4, "zero": 2, **INTERLEAVED},
    "pp_fsdp": {"pp": 4, "fsdp": 2},
    "pp_fsdp_circular": {"pp": 2, "fsdp": 4, **CIRCULAR},
    "pp_tp": {"pp": 2, "tp": 4},
    "pp_tp_sp": {"pp": 4, "tp": 2, **SP},
    "pp_cp": {"pp": 4, "cp": 2},
    "pp_cp_gather": {"pp": 2, "cp": 4, **GATHER},
    # triples
    "dp_fsdp_tp": {"dp": 2, "fsdp": 2, "tp": 2, "zero": 1},
    "dp_fsdp_cp": {"dp": 2, "fsdp": 2, "cp": 2},
    "dp_cp_tp": {"dp": 2, "cp": 2, "tp": 2, "zero": 2},
    "fsdp_cp_tp": {"fsdp": 2, "cp": 2, "tp": 2, **SP},
    "pp_dp_fsdp": {"pp": 2, "dp": 2, "fsdp": 2, "zero": 1},
    "pp_dp_tp": {"pp": 2, "dp": 2, "tp": 2, **SP},
    "pp_dp_cp": {"pp": 2, "dp": 2, "cp": 2, **INTERLEAVED},
    "pp_fsdp_tp": {"pp": 2, "fsdp": 2, "tp": 2, **CIRCULAR},
    "pp_fsdp_cp": {"pp": 2, "fsdp": 2, "cp": 2, **GPIPE},
    "pp_cp_tp": {"pp": 2, "cp": 2, "tp": 2, **INTERLEAVED, **SP},
    "pp_cp_tp_gather": {"pp": 2, "cp": 2, "tp": 2, **GATHER},
    # all five, on 32 devices
    "all": {"pp": 2, "dp": 2, "fsdp": 2, "cp": 2, "tp": 2, "zero": 1, **SP},
}
FACTORS = {
    "layout": tuple(LAYOUTS),
    "remat": ("none", "selective", "full"),
    "style": tuple(STYLES),
    "accumulate": (1, 2),  # times the stages of a pipeline
    "dropout": (0.0, 0.1),
    "packed": (False, True),
    "z_loss": (0.0, 1e-3),  # and with it the loss in chunks
    "dtype": ("float32", "float64"),
}
TOLERANCE = {  # losses relative, parameters absolute
    "float32": (1e-5, 1e-5),
    "float64": (1e-13, 1e-11),
}


TWO_LEVELS = tuple(name for name, levels in FACTORS.items() if len(levels) == 2)


class Cell(NamedTuple):
    layout: str
    remat: str
    style: str
    accumulate: int
    dropout: float
    packed: bool
    z_loss: float
    dtype: str


def cells() -> Iterator[Cell]:
    """Three of each layout, which meets every level of the other factors in them."""
    for i, layout in enumerate(LAYOUTS):
        for j, remat in enumerate(FACTORS["remat"]):
            # Of a layout's three cells one or two have a factor's second level: six patterns.
            patterns = [1 + (i * 5 + f * 2 + i // 6 * (f + 1)) % 6 for f in range(5)]
            levels = [FACTORS[f][p >> j & 1] for f, p in zip(TWO_LEVELS, patterns, strict=True)]
            yield Cell(layout, remat, FACTORS["style"][(i + j + i // 3) % 3], *levels)


CELLS = list(cells())
FAST = (  # layouts of which one cell is in the fast tier
    "pp_dp_fsdp", "pp_gpipe", "pp_tp_sp", "dp_cp_gather", "dp_tp", "zero2", "fsdp_cp_tp",
    "pp_dp_cp", "dp_fsdp_tp",
)  # fmt: skip
SMOKE = ("fsdp_cp_tp", "pp_dp_cp", "pp_tp_sp")


def pairs(cells: Collection[Cell], names: Collection[str]) -> set:
    """What every two factors of these names have in common cells."""
    return {
        (one, getattr(c, one), other, getattr(c, other))
        for one, other in combinations(names, 2)
        for c in cells
    }


@cache
def fast_cells() -> dict[str, Cell]:
    """Of each layout in FAST the cell that adds most pairs of levels of the other factors."""
    chosen, names = {}, tuple(FACTORS)[1:]
    for layout in FAST:
        met = pairs(chosen.values(), names)
        own = [c for c in CELLS if c.layout == layout]
        chosen[layout] = max(own, key=lambda c: len(pairs([c], names) - met))
    return chosen


def marks(cell: Cell) -> tuple:
    if cell not in fast_cells().values():
        return (pytest.mark.slow,)
    return (pytest.mark.smoke,) if cell.layout in SMOKE else ()


def test_the_cells_cover_every_pair_of_levels():
    everything = pairs(list(map(Cell._make, product(*FACTORS.values()))), FACTORS)
    assert pairs(CELLS, FACTORS) == everything
    others = tuple(FACTORS)[1:]
    possible = {pair for pair in everything if "layout" not in pair}
    assert possible == pairs(fast_cells().values(), others)
    assert len(LAYOUTS) >= 40


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, marks=marks(c)) for c in CELLS],
    ids=lambda cell: "-".join(map(str, cell)),
)
def test_every_layout_trains_as_one_device_does(cell, request):
    sizes = LAYOUTS[cell.layout]
    if (count := math.prod(sizes.get(a, 1) for a in MESH_AXES)) > len(jax.devices()):
        return run_with(count, request.node.nodeid)
    losses, params = train(cell)
    what = cell._replace(layout="single", remat="none", accumulate=1)
    expected_losses, expected_params = train_on_one_device(what)
    rtol, atol = TOLERANCE[cell.dtype]
    assert len(set(losses)) == STEPS  # each step saw another batch and other weights
    np.testing.assert_allclose(losses, expected_losses, rtol=rtol)
    assert params.keys() == expected_params.keys()
    for name, value in params.items():
        assert value.dtype == cell.dtype
        np.testing.assert_allclose(value, expected_params[name], rtol=0, atol=atol, err_msg=name)


def run_with(devices, test):
    """This test again in a process with as many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", test], env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


@cache
def train_on_one_device(cell):
    return train(cell)


def train(cell):
    """Losses and last parameters of STEPS steps, each on a batch of its own."""
    run = run_of(cell)
    losses = []
    with jax.enable_x64(cell.dtype == "float64"):
        layout = tiny_layout(run, **LAYOUTS.get(cell.layout, {}))
        steps = make_steps(run, layout)
        state = jax.tree.map(
            lambda value, planned: jax.device_put(value.copy(), planned.sharding),
            first_state(cell.style, cell.dtype),
            steps.abstract,
        )
        for seed in range(STEPS):
            batch = tiny_batch(run, seed, packed=cell.packed)
            state, metrics = steps.train(state, place(batch, layout))
            assert metrics["applied"]
            losses.append(float(metrics["loss"]))
        return losses, named(state.params)


@cache
def first_state(style, dtype):
    """On the host. That it is the same under every layout is shown in models/test_gpt.py."""
    run = run_of(Cell("single", "none", style, 1, 0.0, False, 0.0, dtype))
    with jax.enable_x64(dtype == "float64"):
        return jax.tree.map(np.array, make_steps(run, tiny_layout(run)).init())


def run_of(cell):
    stages = LAYOUTS.get(cell.layout, {}).get("pp", 1)
    return tiny_run(
        cell.style,
        model={"dropout": cell.dropout, "dtype": cell.dtype, "n_layers": 4},
        train={
            "remat": cell.remat,
            "accumulate": cell.accumulate * stages,
            "z_loss": cell.z_loss,
            "loss_chunks": 2 if cell.z_loss and cell.layout != "single" else None,
        },
        optimizer={"eps": 1e-8 if cell.dtype == "float64" else 1e-6},
    )
