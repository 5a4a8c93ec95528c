"""The schedules on a toy whose stages are small: every order of work gives the plain derivative."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.layout import Layout
from mlm_jax.models.chunks import exchanges
from mlm_jax.models.pipeline import Parts, pipelined_grads, pipelined_sums
from mlm_jax.step import make_steps
from tests.collectives import collectives
from tests.conftest import place, tiny_batch, tiny_layout, tiny_run

V, D, T, B = 11, 6, 8, 4


def blocks_of(chunk, x, micro, layer):
    def block(x, w_and_number):
        w, number = w_and_number
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number)))
        return jnp.tanh(x @ w) + noise(micro["keys"])[:, None, None], None

    return jax.lax.scan(block, x, (chunk, layer + jnp.arange(len(chunk))))[0]


def last_of(rest, x, micro):
    logits = x @ rest["table"].T  # tied
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), micro["targets"][..., None], -1).sum()
    return nats / 10, {"nats": nats, "tokens": jnp.int32(micro["targets"].size)}


TOY = Parts(lambda rest, micro: rest["table"][micro["tokens"]], blocks_of, last_of)


def toy(layers, m):
    rng = np.random.default_rng(0)
    rest = {"table": rng.normal(size=(V, D))}
    blocks = rng.normal(size=(layers, D, D)) / 2
    ids = rng.integers(0, V, (2, m, B, T))
    keys = jax.random.split(jax.random.key(0), (m, B))
    return rest, blocks, {"tokens": ids[0], "targets": ids[1], "keys": keys}


def plain(rest, blocks, micros):
    """(objective, sums) of all microbatches, one after the other."""
    found = []
    for i in range(len(micros["tokens"])):
        micro = jax.tree.map(lambda x: x[i], micros)  # noqa: B023
        x = blocks_of(blocks, TOY.first(rest, micro), micro, 0)
        found.append(last_of(rest, x, micro))
    return jax.tree.map(lambda *x: sum(x), *found)


slow = pytest.mark.slow
CASES = [  # schedule, remat, stages, chunks, layers, microbatches, dp, cp
    pytest.param("gpipe", "none", 2, 1, 4, 5, 2, 1, marks=slow),
    pytest.param("gpipe", "full", 4, 1, 4, 4, 1, 2, marks=slow),
    pytest.param("circular", "none", 2, 3, 6, 4, 1, 1, marks=slow),
    pytest.param("circular", "full", 4, 2, 8, 4, 2, 1, marks=slow),
    pytest.param("1f1b", "none", 2, 1, 2, 2, 1, 4, marks=slow),
    pytest.param("1f1b", "none", 4, 1, 8, 7, 2, 1, marks=slow),
    pytest.param("1f1b", "none", 8, 1, 8, 9, 1, 1, marks=slow),
    pytest.param("1f1b", "none", 2, 2, 4, 6, 2, 2, marks=pytest.mark.smoke),
    pytest.param("1f1b", "none", 4, 3, 12, 8, 1, 1, marks=slow),
]


@pytest.mark.parametrize(("schedule", "remat", "pp", "chunks", "layers", "m", "dp", "cp"), CASES)
def test_every_schedule_gives_the_plain_sums_and_gradients(
    schedule, remat, pp, chunks, layers, m, dp, cp
):
    with jax.enable_x64(True):
        devices = jax.devices()[: pp * dp * cp]
        layout = Layout.create(
            devices, pp=pp, dp=dp, cp=cp, pipeline=schedule, chunks=chunks if chunks > 1 else None
        )
        rest, blocks, micros = toy(layers, m)
        given = jax.device_put((rest, blocks), layout.sharding()), micros
        run = jax.jit(lambda w, micros: pipelined_grads(TOY, *w, micros, layout, remat))
        sums, grads = run(*given)
        (_, expected), gradients = jax.value_and_grad(lambda w: plain(*w, micros), has_aux=True)(
            (rest, blocks)
        )
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)  # noqa: E731
        jax.tree.map(close, sums, expected)
        jax.tree.map(lambda parts, g: close(parts.sum(0), g), grads, gradients)
        assert grads[1].sharding.spec[1] == "pp"
        forward = jax.jit(lambda w, micros: pipelined_sums(TOY, *w, micros, layout))(*given)
        jax.tree.map(close, forward, expected)


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("v", [2, 3, 4, 5, 8])
def test_chunks_are_exchanged_in_as_many_permutations_as_there_are(p, v):
    rounds = exchanges(p, v)
    assert len(rounds) == v
    moved = set()
    for moves in rounds:
        assert sorted(a for a, *_ in moves) == sorted(b for _, _, b, _ in moves) == list(range(p))
        for a, at, b, to in moves:
            assert a * v + at == to * p + b  # the same virtual stage
            moved.add(a * v + at)
    assert moved == set(range(p * v))


PP, L, T_MODEL = 4, 8, 48


def model_run(accumulate, remat="none", rows=2):
    return tiny_run(
        model={"n_layers": L, "seq_len": T_MODEL, "d_model": 64, "n_heads": 2},
        train={"accumulate": accumulate, "global_batch_size": rows * accumulate, "remat": remat},
    )


def compiled(schedule, accumulate, chunks=1, remat="none", **sizes):
    run = model_run(accumulate, remat)
    return compile_step(run, tiny_layout(run, pp=PP, pipeline=schedule, chunks=chunks, **sizes))


def compile_step(run, layout):
    steps = make_steps(run, layout)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding("batch", None))
        for name, x in tiny_batch(run).items()
    }
    return steps.train.lower(steps.abstract, batch).compile()


def test_1f1b_holds_activations_of_stages_and_not_of_microbatches():
    temporary = {
        (schedule, m): compiled(schedule, m, remat=remat).memory_analysis().temp_size_in_bytes
        for schedule, remat in (("1f1b", "none"), ("gpipe", "full"))
        for m in (8, 32)
    }
    inputs = 24 * 2 * T_MODEL * 64 * 4  # of 24 more microbatches, [2, T, D] in float32
    tokens = (
        24 * 2 * T_MODEL * (3 * 4 + 4)
    )  # of the batch itself: tokens, targets, weights, positions
    assert temporary["1f1b", 32] - temporary["1f1b", 8] < 2 * tokens < inputs / 4
    assert temporary["gpipe", 32] - temporary["gpipe", 8] > 0.9 * inputs


@pytest.mark.parametrize("chunks", [pytest.param(1, marks=slow), 2])
def test_a_tick_sends_one_activation_on_and_one_gradient_back(chunks):
    m = 8
    found = collectives(compiled("1f1b", m, chunks, dp=2).as_text())
    permutes = [c for c in found if c.kind == "collective-permute"]
    sent = sum(c.times for c in permutes if c.shapes[0] == (1, T_MODEL, 64))
    assert sent == 2 * (m * chunks + PP - 1)
    weights = Counter()
    for c in permutes:
        if c.shapes[0] != (1, T_MODEL, 64):
            weights[c.shapes[0]] += c.times
    # With several chunks, each part of the weights goes round once, and its gradient back.
    stacked = Counter((L // (PP * chunks), *w.shape[1:]) for w in blocks())
    assert weights == Counter(
        {shape: 2 * chunks * n for shape, n in stacked.items()} if chunks > 1 else {}
    )
    # Gradients are summed over dp once, after the ticks.
    assert {c.kind for c in found} == {"collective-permute", "all-reduce"}
    assert not [c for c in found if c.kind == "all-reduce" and c.looped]


@pytest.mark.parametrize(
    "sizes",
    [{"pp": 2, "fsdp": 2, "tp": 2}, pytest.param({"dp": 2, "fsdp": 2}, marks=slow)],
    ids=str,
)
def test_beside_stages_and_accumulation_only_weights_are_gathered(sizes):
    """Within a shard_map XLA would gather the operands of scatters: all tokens of a batch."""
    run = model_run(4, rows=4)
    gathers = [
        shape
        for c in collectives(compile_step(run, tiny_layout(run, **sizes)).as_text())
        if c.kind in ("all-gather", "all-to-all")
        for shape in c.shapes
    ]
    weights = {w.shape for w in jax.tree.leaves(make_steps(run, tiny_layout(run)).abstract.params)}
    assert gathers
    assert all(T_MODEL not in shape for shape in gathers if shape != (T_MODEL, 64)), gathers
    assert (T_MODEL, 64) in weights  # learned positions


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{"pp": 2, "cp": 2}, {"pp": 2, "dp": 2, "chunks": 2}],
    ids=str,
)
def test_in_bfloat16_stages_are_as_exact_as_one_device(sizes):
    given = {"n_layers": 4, "dropout": 0.1}
    found = {}
    for dtype, where in (("float32", {}), ("bfloat16", {}), ("bfloat16", sizes)):
        run = tiny_run(model=given | {"dtype": dtype}, train={"accumulate": 4})
        layout = tiny_layout(run, **where)
        steps = make_steps(run, layout)
        batch = place(tiny_batch(run, packed=True), layout)
        metrics = steps.train(steps.init(), batch)[1]
        found[dtype, bool(where)] = [float(metrics[k]) for k in ("loss", "grad_norm")]
    exact, *rounded = found.values()
    for numbers in rounded:
        assert numbers != exact
        np.testing.assert_allclose(numbers, exact, rtol=2**-8)  # what bfloat16 resolves


def test_an_evaluation_goes_through_the_stages():
    run = tiny_run(model={"n_layers": 4, "dropout": 0.1}, train={"accumulate": 4})
    layouts = tiny_layout(run), tiny_layout(run, pp=2, chunks=2, dp=2, tp=2)
    nats = []
    for layout in layouts:
        steps = make_steps(run, layout)
        batch = place(tiny_batch(run, packed=True), layout)
        nats.append(jax.device_get(steps.evaluate(steps.init().params, batch)))
    np.testing.assert_allclose(nats[1], nats[0], rtol=1e-6)


def blocks():
    run = model_run(8)
    return jax.tree.leaves(make_steps(run, tiny_layout(run)).abstract.params["blocks"])
