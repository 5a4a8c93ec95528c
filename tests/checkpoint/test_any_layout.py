"""Law 2: one checkpoint fits every layout. Saved under one that is drawn, restored under another.

Parameters and moments come back bit for bit, each where the new layout wants it, and the next loss
is that of the saved weights on one device.
"""

import tempfile
from collections.abc import Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mlm_jax.checkpoint.manager import Checkpoints
from mlm_jax.config import CheckpointConfig, RunConfig
from mlm_jax.errors import LayoutError
from mlm_jax.optimizer import RULES
from mlm_jax.step import TrainState, abstract_state, make_steps
from tests.conftest import STYLES, place, tiny_batch, tiny_layout, tiny_run

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # of the loss, whose sums have another order

Sizes = tuple[tuple[str, Any], ...]  # (("dp", 2), ("tp", 4), ("zero", 1)): hashable


class Model(NamedTuple):
    style: str
    n_layers: int
    n_kv_heads: int
    tied: bool
    dtype: str


class Case(NamedTuple):
    model: Model
    optimizer: str
    saved: Sizes
    restored: Sizes
    seed: int


@st.composite
def cases(draw) -> Case:
    model = Model(
        draw(st.sampled_from(list(STYLES))), draw(st.sampled_from((2, 4))),
        draw(st.sampled_from((2, 8))), draw(st.booleans()), draw(st.sampled_from(list(TOLERANCE))),
    )  # fmt: skip
    saved = draw(st.sampled_from(layouts_of(model)))
    restored = draw(st.sampled_from([sizes for sizes in layouts_of(model) if sizes != saved]))
    optimizer, seed = draw(st.sampled_from(list(RULES))), draw(st.integers(0, 2**32 - 1))
    return Case(model, optimizer, saved, restored, seed)


LONG = settings(  # an example takes seconds: a failing one is shown as it was drawn
    deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=(HealthCheck.too_slow,),
)  # fmt: skip


@settings(LONG, max_examples=3, derandomize=True)
@given(cases())
def test_a_checkpoint_fits_every_layout(case):
    check(case)


@pytest.mark.slow
@settings(LONG, max_examples=40)
@given(cases())
def test_a_checkpoint_fits_every_layout_in_many_cases(case):
    check(case)


def check(case: Case) -> None:
    with jax.enable_x64(case.model.dtype == "float64"), tempfile.TemporaryDirectory() as folder:
        before, after = (plan(case, sizes) for sizes in (case.saved, case.restored))
        state = random_state(before, case.seed)
        with Checkpoints(Path(folder), CheckpointConfig(keep=1)) as checkpoints:
            checkpoints.save(3, put(state, before))
            restored = checkpoints.restore(after)
        jax.tree.map(assert_same, restored, state, after)
        found = loss(case.model, case.restored, restored.params)
        expected = loss(case.model, (), put(state, plan(case, ())).params)
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE[case.model.dtype])


def assert_same(x: jax.Array, expected: np.ndarray, planned: jax.ShapeDtypeStruct) -> None:
    assert x.dtype == expected.dtype
    assert x.sharding.is_equivalent_to(planned.sharding, x.ndim)
    assert np.asarray(x).tobytes() == expected.tobytes()


@cache
def layouts_of(model: Model) -> list[Sizes]:
    """All layouts of up to eight devices that fit, with the settings that go with their axes."""
    fitting = []
    for sizes in product((1, 2, 4, 8), repeat=5):
        named = dict(zip(("pp", "dp", "fsdp", "cp", "tp"), sizes, strict=True))
        if np.prod(sizes) > 8:
            continue
        for more in settings_of(named):
            chosen = tuple({k: n for k, n in named.items() if n > 1}.items()) + more
            try:
                tiny_layout(run_of(model, "adamw", chosen), **dict(chosen))
            except LayoutError:
                continue
            fitting.append(chosen)
    return fitting


def settings_of(named: Mapping[str, int]) -> list[Sizes]:
    """Combinations of what can be set beside these sizes."""
    choices = [
        [(), (("pipeline", "circular"), ("chunks", 2))] if named["pp"] > 1 else [()],
        [(), (("zero", 1),), (("zero", 2),)] if named["dp"] > 1 else [()],
        [(), (("cp_attention", "all_gather"),)] if named["cp"] > 1 else [()],
        [(), (("sequence_parallel", True),)] if named["tp"] > 1 else [()],
    ]
    return [sum(chosen, ()) for chosen in product(*choices)]


def run_of(model: Model, optimizer: str, sizes: Sizes) -> RunConfig:
    """Adafactor factors from 128 on. A pipeline wants as many microbatches as stages."""
    return tiny_run(
        model.style,
        model={
            "d_model": 128, "d_mlp": 160, "n_heads": 8, "seq_len": 16,
            "n_layers": model.n_layers, "n_kv_heads": model.n_kv_heads,
            "tied": model.tied, "dtype": model.dtype,
        },
        train={"global_batch_size": 32, "accumulate": dict(sizes).get("pp", 1)},
        optimizer={"name": optimizer},
    )  # fmt: skip


def plan(case: Case, sizes: Sizes) -> TrainState:
    run = run_of(case.model, case.optimizer, sizes)
    return abstract_state(run, tiny_layout(run, **dict(sizes)))


def random_state(like: TrainState, seed: int) -> TrainState:
    """On the host. No value is there twice, so that none can take the place of another."""
    rng = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(like)
    values = (rng.normal(size=x.shape, scale=0.1 if x.ndim else 100) for x in leaves)
    return structure.unflatten([v.astype(x.dtype) for v, x in zip(values, leaves, strict=True)])


def put(state: TrainState, planned: TrainState) -> TrainState:
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), state, planned)


def loss(model: Model, sizes: Sizes, params: Any) -> float:
    evaluate, batch = compiled(model, sizes)
    nats, weights = evaluate(params, batch)
    return float(nats / weights)


@cache
def compiled(model: Model, sizes: Sizes) -> tuple[Any, Any]:
    """Which optimizer it was makes no difference here."""
    run = run_of(model, "adamw", sizes)
    layout = tiny_layout(run, **dict(sizes))
    return make_steps(run, layout).evaluate, place(tiny_batch(run), layout)
