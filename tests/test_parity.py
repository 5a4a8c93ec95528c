"""Law 1: any layout, same numbers. Training under a layout equals training on one device.

float64 proves it: nothing but the order of sums may differ, and errors are those of rounding.

float32, which runs use, is held to 1e-5, with Adam's epsilon at 1e-6. At 1e-8 the losses agree as
well, but Adam divides a gradient by its own size: where that is rounding, so is the direction the
weight moves in. Measured over these cells: the bias of the keys, which softmax cancels and whose
gradient is 0 but for rounding, ends up to 2e-4 apart, and a handful of 130,000 other weights too.
"""

from functools import cache
from itertools import combinations, product
from typing import NamedTuple

import jax
import numpy as np
import pytest

from mlm_jax.step import make_steps
from tests.conftest import LAYOUTS, STYLES, named, place, tiny_batch, tiny_layout, tiny_run

STEPS = 5
FACTORS = {
    "layout": tuple(LAYOUTS),
    "remat": ("none", "selective", "full"),
    "accumulate": (1, 4),
    "style": tuple(STYLES),
    "dropout": (0.0, 0.1),
    "packed": (False, True),
    "z_loss": (0.0, 1e-3),  # and with it the loss in chunks
    "zero": (0, 1),  # ZeRO-1, where there is a dp axis
    "dtype": ("float32", "float64"),
}
TOLERANCE = {  # losses relative, parameters absolute; float32 measured 1.0e-6 and 4.4e-6
    "float32": (1e-5, 1e-5),
    "float64": (1e-13, 1e-11),
}


def has_dp(layout):
    return LAYOUTS[layout].get("dp", 1) > 1


class Cell(NamedTuple):
    layout: str
    remat: str
    accumulate: int
    style: str
    dropout: float
    packed: bool
    z_loss: float
    zero: int
    dtype: str


CELLS = [  # every pair of levels, in as few cells as six layouts and three remats allow
    Cell("dp", "none", 1, "gpt2", 0.0, False, 0.0, 0, "float64"),
    Cell("dp", "selective", 4, "llama", 0.1, True, 1e-3, 1, "float64"),
    Cell("dp", "full", 1, "nouns", 0.1, True, 0.0, 1, "float32"),
    Cell("fsdp", "none", 4, "llama", 0.0, False, 1e-3, 0, "float32"),
    Cell("fsdp", "selective", 1, "gpt2", 0.1, True, 0.0, 0, "float32"),
    Cell("fsdp", "full", 4, "nouns", 0.0, True, 1e-3, 0, "float64"),
    Cell("tp", "none", 4, "gpt2", 0.1, False, 0.0, 1, "float64"),
    Cell("tp", "selective", 1, "llama", 0.0, True, 1e-3, 1, "float32"),
    Cell("tp", "full", 4, "nouns", 0.0, False, 1e-3, 0, "float64"),
    Cell("tp_sp", "none", 1, "nouns", 0.0, True, 0.0, 1, "float32"),
    Cell("tp_sp", "selective", 4, "gpt2", 0.1, False, 1e-3, 0, "float32"),
    Cell("tp_sp", "full", 1, "llama", 0.1, False, 0.0, 0, "float64"),
    Cell("fsdp_tp", "none", 1, "gpt2", 0.0, False, 1e-3, 0, "float32"),
    Cell("fsdp_tp", "selective", 4, "nouns", 0.0, True, 0.0, 0, "float64"),
    Cell("fsdp_tp", "full", 1, "llama", 0.1, True, 1e-3, 0, "float32"),
    Cell("dp_fsdp_tp", "none", 1, "llama", 0.0, False, 0.0, 0, "float64"),
    Cell("dp_fsdp_tp", "selective", 4, "nouns", 0.1, True, 1e-3, 0, "float32"),
    Cell("dp_fsdp_tp", "full", 4, "gpt2", 0.1, False, 0.0, 1, "float32"),
]
SMOKE = {CELLS[1], CELLS[9], CELLS[14]}
FULL = [  # every layout, remat and style, with all that could make them differ
    cell
    for cell in map(Cell._make, product(*FACTORS.values()))
    if cell[4:] == (0.1, True, 1e-3, int(has_dp(cell.layout)), "float64")
    and cell.accumulate == 4
    and cell not in CELLS
]


def test_the_cells_cover_every_pair_of_levels():
    possible = [
        cell
        for cell in map(Cell._make, product(*FACTORS.values()))
        if has_dp(cell.layout) or not cell.zero
    ]
    for one, other in combinations(FACTORS, 2):
        levels = [{(getattr(c, one), getattr(c, other)) for c in cs} for cs in (CELLS, possible)]
        assert levels[0] == levels[1]


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, marks=pytest.mark.smoke if c in SMOKE else ()) for c in CELLS]
    + [pytest.param(c, marks=pytest.mark.slow) for c in FULL],
    ids=lambda cell: "-".join(map(str, cell)),
)
def test_every_layout_trains_as_one_device_does(cell):
    assert_trains_as_one_device_does(cell, LAYOUTS[cell.layout])


def assert_trains_as_one_device_does(cell, sizes):
    losses, params = train(cell, sizes)
    what = cell._replace(layout="single", remat="none", accumulate=1, zero=0)
    expected_losses, expected_params = train_on_one_device(what)
    rtol, atol = TOLERANCE[cell.dtype]
    assert len(set(losses)) == STEPS  # each step saw another batch and other weights
    np.testing.assert_allclose(losses, expected_losses, rtol=rtol)
    assert params.keys() == expected_params.keys()
    for name, value in params.items():
        assert value.dtype == cell.dtype
        np.testing.assert_allclose(value, expected_params[name], rtol=0, atol=atol, err_msg=name)


@cache
def train_on_one_device(cell):
    return train(cell, {})


def train(cell, sizes):
    """Losses and last parameters of STEPS steps, each on a batch of its own."""
    run = run_of(cell)
    losses = []
    with jax.enable_x64(cell.dtype == "float64"):
        layout = tiny_layout(run, **sizes, zero=cell.zero)
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
    run = run_of(Cell("single", "none", 1, style, 0.0, False, 0.0, 0, dtype))
    with jax.enable_x64(dtype == "float64"):
        return jax.tree.map(np.array, make_steps(run, tiny_layout(run)).init())


def run_of(cell):
    return tiny_run(
        cell.style,
        model={"dropout": cell.dropout, "dtype": cell.dtype},
        train={
            "remat": cell.remat,
            "accumulate": cell.accumulate,
            "z_loss": cell.z_loss,
            "loss_chunks": 4 if cell.z_loss and cell.layout != "single" else None,
        },
        optimizer={"eps": 1e-8 if cell.dtype == "float64" else 1e-6},
    )
