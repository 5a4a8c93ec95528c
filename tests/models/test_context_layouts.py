"""Law 1 where sequences are split: under cp all is as on one device, in the order of the text.

Cells, steps and tolerances are those of tests/test_parity.py.
"""

import jax
import numpy as np
import pytest

from mlm_jax.errors import ConfigError
from mlm_jax.inference.engine import Sampling, generate_ids
from mlm_jax.models import build, declare
from tests.conftest import STYLES, tiny_batch, tiny_layout, tiny_run
from tests.test_parity import Cell, assert_trains_as_one_device_does

LAYOUTS = {
    "cp2": {"cp": 2},
    "cp4": {"cp": 4},
    "cp8": {"cp": 8},
    "gathered": {"cp": 4, "cp_attention": "all_gather"},
    "dp_cp": {"dp": 2, "cp": 4},
    "fsdp_cp": {"fsdp": 2, "cp": 2},
    "cp_tp": {"cp": 2, "tp": 4},  # as many as two key/value heads need a copy each
    "cp_tp_sp": {"cp": 2, "tp": 2, "sequence_parallel": True},
    "dp_cp_tp_sp": {"dp": 2, "cp": 2, "tp": 2, "sequence_parallel": True},
    "fsdp_cp_tp": {"fsdp": 2, "cp": 2, "tp": 2, "cp_attention": "all_gather"},
}
CELLS = [  # every layout once; every remat with every style
    Cell("cp2", "none", 1, "nouns", 0.1, True, 0.0, 0, "float64"),
    Cell("cp4", "selective", 4, "gpt2", 0.0, True, 0.0, 0, "float64"),
    Cell("cp8", "full", 1, "llama", 0.1, True, 0.0, 0, "float32"),
    Cell("gathered", "none", 4, "gpt2", 0.1, False, 1e-3, 0, "float32"),
    Cell("dp_cp", "selective", 1, "llama", 0.0, True, 1e-3, 1, "float64"),
    Cell("fsdp_cp", "full", 1, "nouns", 0.1, True, 0.0, 0, "float32"),
    Cell("cp_tp", "none", 4, "llama", 0.1, False, 0.0, 0, "float64"),
    Cell("cp_tp_sp", "selective", 1, "nouns", 0.1, True, 1e-3, 0, "float32"),
    Cell("dp_cp_tp_sp", "full", 1, "gpt2", 0.0, False, 1e-3, 0, "float64"),
    Cell("fsdp_cp_tp", "none", 1, "nouns", 0.1, True, 0.0, 0, "float64"),
]
REMATS = ("none", "selective", "full")
FULL = [  # every layout with every style, and all that could make them differ
    Cell(layout, REMATS[(i + j) % 3], 4, style, 0.1, True, 1e-3, 0, "float64")
    for i, layout in enumerate(LAYOUTS)
    for j, style in enumerate(STYLES)
]


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, marks=pytest.mark.smoke if c == CELLS[1] else ()) for c in CELLS]
    + [pytest.param(c, marks=pytest.mark.slow) for c in FULL],
    ids=lambda cell: "-".join(map(str, cell)),
)
def test_training_with_split_sequences_is_that_of_one_device(cell):
    assert_trains_as_one_device_does(cell, LAYOUTS[cell.layout])


def test_a_model_takes_and_gives_tokens_in_the_order_of_the_text():
    run = tiny_run("llama", train={"global_batch_size": 2})
    batch = tiny_batch(run, packed=True)
    rows = {f"{name}_BT": batch[name] for name in ("segments", "positions")}
    found = []
    for sizes in ({}, {"cp": 4}):
        model = build(run.model, tiny_layout(run, **sizes))
        call = jax.jit(lambda model, tokens, rows: (model(tokens, **rows), model(tokens)))
        found.append(call(model, batch["tokens"], rows))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(found[0][0] - found[0][1]).max() > 0.1


def test_generation_under_cp_is_that_of_one_device():
    run = tiny_run("nouns")
    prompts = [[3, 4, 5], [7] * 11]
    draw = Sampling(temperature=1.0, top_k=50)
    one, other = (
        generate_ids(
            build(run.model, tiny_layout(run, **sizes)), prompts, max_tokens=8, sampling=draw
        )
        for sizes in ({}, {"cp": 2, "tp": 2, "sequence_parallel": True})
    )
    assert one == other


def test_cudnn_is_refused_where_sequences_are_split():
    cross = {"cross_document_attention": True}
    run = tiny_run(model={"attention": "cudnn", "dtype": "bfloat16"}, data=cross)
    with pytest.raises(ConfigError, match=r"layout\.cp=2 splits; try .*'auto', or layout\.cp=1"):
        declare(run.model, tiny_layout(run, cp=2))
