"""ZeRO's stages: the numbers of one device, what a device holds, and what is sent how often."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.errors import LayoutError
from mlm_jax.layout import Layout, bytes_held
from mlm_jax.step import abstract_state, make_steps
from tests.collectives import collectives
from tests.conftest import named, place, tiny_batch, tiny_layout, tiny_run

STEPS = 3
TOLERANCE = {"float32": (1e-5, 1e-5), "float64": (1e-13, 1e-11)}  # as in test_parity
DP, HYBRID = {"dp": 8}, {"dp": 2, "fsdp": 4}
ALL, SP = {"dp": 2, "fsdp": 2, "tp": 2}, {"dp": 2, "tp": 4, "sequence_parallel": True}
CELLS = [  # layout, zero, style, remat, accumulate, dropout and packed documents, dtype
    (DP, 0, "gpt2", "none", 4, True, "float32"),
    (ALL, 1, "llama", "none", 4, True, "float64"),
]
FULL = [
    (DP, 1, "llama", "selective", 4, True, "float64"),
    (HYBRID, 0, "llama", "full", 4, True, "float64"),
    (SP, 0, "gpt2", "selective", 4, True, "float32"),
    (DP, 2, "gpt2", "full", 2, True, "float32"),
    (HYBRID, 1, "gpt2", "none", 2, False, "float64"),
    (ALL, 0, "nouns", "selective", 2, False, "float32"),
    (ALL, 2, "nouns", "none", 4, True, "float64"),
    (SP, 1, "nouns", "full", 4, True, "float64"),
    (SP, 2, "gpt2", "selective", 4, True, "float32"),
]


def name_of(cell):
    sizes, zero, *rest = cell
    return "-".join([*(f"{a}{n}" for a, n in sizes.items()), f"zero{zero}", *map(str, rest)])


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, marks=pytest.mark.smoke if c[0] is ALL else ()) for c in CELLS]
    + [pytest.param(c, marks=pytest.mark.slow) for c in FULL],
    ids=name_of,
)
def test_every_stage_trains_as_one_device_does(cell):
    sizes, zero, style, remat, accumulate, noisy, dtype = cell
    losses, params, watched = train(style, remat, accumulate, noisy, dtype, zero=zero, **sizes)
    expected = on_one_device(style, noisy, dtype)
    rtol, atol = TOLERANCE[dtype]
    assert len(set(losses)) == STEPS
    np.testing.assert_allclose(losses, expected[0], rtol=rtol)
    for name, value in params.items():
        np.testing.assert_allclose(value, expected[1][name], rtol=0, atol=atol, err_msg=name)
    for name, value in watched.items():  # means of activations over all rows, and their maximum
        np.testing.assert_allclose(value, expected[2][name], rtol=1e-4, err_msg=name)


@cache
def on_one_device(style, noisy, dtype):
    return train(style, "none", 1, noisy, dtype)


def train(style, remat, accumulate, noisy, dtype, **sizes):
    """Losses, last parameters, and the sizes of activations in the last step."""
    run = tiny_run(
        style,
        model={"dropout": 0.1 if noisy else 0.0, "dtype": dtype},
        train={"remat": remat, "accumulate": accumulate},
        optimizer={"eps": 1e-8 if dtype == "float64" else 1e-6},
        watch={"activations": True},
    )
    losses, metrics = [], {}
    with jax.enable_x64(dtype == "float64"):
        layout = tiny_layout(run, **sizes)
        steps = make_steps(run, layout)
        state = steps.init()
        for seed in range(STEPS):
            batch = place(tiny_batch(run, seed, packed=noisy), layout)
            state, metrics = steps.train(state, batch)
            assert metrics["applied"]
            losses.append(float(metrics["loss"]))
        watched = {
            f"{kind} {name}": np.asarray(x)
            for kind, group in metrics["watched"].items()
            for name, x in group.items()
        }
        return losses, named(state.params), watched


RULES = [  # by hand: what the usual rules split over dp and cp, split otherwise
    {"batch": ("dp", "cp"), "seq": (), "residual_seq": ()},
    {"seq": (), "residual_seq": ()},  # cp idles
    {"embed": ("fsdp", "dp")},
]


@pytest.mark.parametrize(
    "rules", [RULES[0], *(pytest.param(r, marks=pytest.mark.slow) for r in RULES[1:])], ids=str
)
def test_rules_by_hand_leave_adding_up_to_xla_and_the_numbers_as_they_are(rules):
    losses, params, _ = train("llama", "none", 4, True, "float64", dp=2, cp=2, rules=rules)
    expected = on_one_device("llama", True, "float64")
    np.testing.assert_allclose(losses, expected[0], rtol=1e-13)
    for name, value in params.items():
        np.testing.assert_allclose(value, expected[1][name], rtol=0, atol=1e-11, err_msg=name)


L, D, V, B, T, N = 3, 64, 4096, 32, 32, 4  # N microbatches; the table dwarfs what else is sent


@cache
def step_of(zero, accumulate=N, **sizes):
    """A compiled step: what it sends, its gradients in bytes a device, its memory."""
    run = tiny_run(
        model={"n_layers": L, "vocab_size": V}, train={"accumulate": accumulate, "remat": "full"}
    )
    layout = tiny_layout(run, **sizes, zero=zero)
    steps = make_steps(run, layout)
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    rows = layout.sharding("batch", None)
    batch = {k: jax.ShapeDtypeStruct((B, T), d, sharding=rows) for k, d in kinds.items()}
    compiled = steps.train.lower(steps.abstract, batch).compile()
    return (
        collectives(compiled.as_text()),
        bytes_held(steps.abstract.params),
        compiled.memory_analysis(),
    )


def sent(ops, kind):
    """Bytes on a device, before a reduce-scatter scatters; of all runs, and those in loops."""
    found = [(c.bytes * c.times, c.looped) for c in ops if c.kind == kind and c.bytes > 1000]
    return sum(n for n, _ in found), sum(n for n, looped in found if looped)


def test_without_zero_gradients_are_reduced_once_after_the_last_microbatch():
    ops, gradients, _ = step_of(0, dp=8)
    assert sent(ops, "all-reduce") == pytest.approx((gradients, 0), rel=1e-3)  # and the loss
    assert not any(sent(ops, kind)[0] for kind in ("all-gather", "reduce-scatter", "all-to-all"))


def test_zero_1_scatters_once_and_gathers_the_new_weights():
    ops, gradients, _ = step_of(1, dp=8)
    scattered = [c for c in ops if c.kind == "reduce-scatter"]
    assert all(c.times == 1 and not c.looped for c in scattered)
    parts = sum(c.bytes for c in scattered)  # as CPUs name them, these are the results
    assert parts * 8 == pytest.approx(gradients, rel=0.01)  # all but what is shorter than 8
    assert sent(ops, "all-gather") == pytest.approx((gradients, 0), rel=0.01)
    assert sum(c.bytes for c in ops if c.kind == "all-reduce") < 0.01 * gradients


def test_zero_2_reduces_in_every_microbatch():
    ops, gradients, _ = step_of(2, dp=8)
    reduced = sent(ops, "reduce-scatter")[0] + sent(ops, "all-reduce")[0]
    table = 4 * V * D  # tied: XLA reduces its gradients by way of lookup and logits one by one
    assert reduced == pytest.approx(N * (gradients + table), rel=0.01)
    assert sent(ops, "reduce-scatter")[1] == sent(ops, "reduce-scatter")[0] > 0
    assert sent(ops, "all-gather") == pytest.approx((gradients, 0), rel=0.01)


@pytest.mark.parametrize("zero", [0, 1])
def test_beside_fsdp_and_tp_a_device_reduces_its_own_shards_once(zero):
    ops, shards, _ = step_of(zero, dp=2, fsdp=2, tp=2)
    once = [c for c in ops if not c.looped and "shard_map" in c.op_name and c.bytes > 1000]
    once = [c for c in once if c.kind in ("all-reduce", "reduce-scatter")]
    ways = {"all-reduce": 1, "reduce-scatter": 2}  # of a scatter, CPUs name the result
    assert sum(c.bytes * ways[c.kind] for c in once) == pytest.approx(shards, rel=0.02)
    assert {c.kind for c in once} >= {"reduce-scatter" if zero else "all-reduce"}


def test_state_is_split_from_stage_1_on():
    states = [step_of(zero, dp=8)[2].argument_size_in_bytes for zero in (0, 1, 2)]
    weights = step_of(0, dp=8)[1]
    assert states[0] == pytest.approx(3 * weights, rel=0.02)
    assert states[1] == states[2] == pytest.approx((1 + 2 / 8) * weights, rel=0.05)


def test_the_state_is_the_same_in_stages_1_and_2():
    run = tiny_run()
    one, two = (abstract_state(run, tiny_layout(run, dp=8, zero=zero)) for zero in (1, 2))
    assert jax.tree.leaves(one) == jax.tree.leaves(two)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"zero": 3},
            "layout.zero=3: weights are split by layout.fsdp; set that instead of layout.dp",
        ),
        ({"zero": 4}, "layout.zero=4 is no stage of ZeRO; try 0, 1 or 2"),
        ({"zero": 2, "fsdp": 8}, "layout.zero=2 does nothing with layout.dp=1; leave it out"),
    ],
    ids=str,
)
def test_what_is_no_stage_is_refused(settings, says):
    with pytest.raises(LayoutError) as refused:
        Layout.create(8, **({"dp": 8} if "fsdp" not in settings else {}), **settings)
    assert says in str(refused.value)
