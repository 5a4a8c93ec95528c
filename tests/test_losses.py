import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mlm_jax.errors import ConfigError
from mlm_jax.losses import fewest_chunks, next_token_nats
from mlm_jax.step import make_steps
from tests.collectives import collectives
from tests.conftest import named, place, tiny_batch, tiny_layout, tiny_run

Z = 1e-2


def plain(model, batch):
    """The objective from all logits at once, by optax, and the nats in it."""
    logits = model(batch["tokens"])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return tuple((x * batch["weights"]).sum() for x in (nats + Z * log_z**2, nats))


SPLIT = {"dp": 2, "tp": 2, "sequence_parallel": True}
IN_PARTS = {"cp": 2, "tp": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("style", "sizes"),
    [("gpt2", {}), ("llama", SPLIT)]
    + [
        pytest.param(*cell, marks=pytest.mark.slow)
        for cell in (("llama", {}), ("gpt2", SPLIT), ("llama", IN_PARTS))
    ],
    ids=str,
)
def test_any_number_of_chunks_gives_the_plain_loss_and_its_gradients(style, sizes):
    run = tiny_run(style, train={"global_batch_size": 8})
    layout = tiny_layout(run, **sizes)
    steps = make_steps(run, layout)
    params, batch = steps.init().params, place(tiny_batch(run), layout)

    def graded(f):
        def objective(params):
            return f(nnx.merge(steps.graphdef, params))

        (_, nats), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
        return float(nats), named(grads)

    expected, expected_grads = graded(lambda model: plain(model, batch))
    largest = max(np.abs(g).max() for g in expected_grads.values())
    for chunks in (1, 4, 32 // layout.ways("residual_seq")):
        nats, grads = graded(
            lambda model, n=chunks: next_token_nats(model, batch, None, chunks=n, z_loss=Z)
        )
        assert nats == pytest.approx(expected, rel=1e-6)
        for name, value in grads.items():
            np.testing.assert_allclose(
                value, expected_grads[name], rtol=0, atol=1e-6 * largest, err_msg=name
            )


@pytest.mark.slow
def test_gradients_in_bfloat16_have_the_size_of_those_in_float32():
    norms = []
    for dtype in ("float32", "bfloat16"):
        run = tiny_run(model={"dtype": dtype}, train={"global_batch_size": 8})
        layout = tiny_layout(run)
        steps = make_steps(run, layout)
        batch = tiny_batch(run)
        batch["weights"][:] = np.arange(8 * 32).reshape(8, 32) < 131  # 1 / 131 is 0.24 % off
        _, metrics = steps.train(steps.init(), place(batch, layout))
        norms.append(np.asarray(metrics["grad_norms"]))
    ratios = norms[1] / norms[0]
    assert np.median(ratios[norms[0] > 1e-2]) == pytest.approx(1, abs=5e-4)


def compiled(run, **sizes):
    layout = tiny_layout(run, **sizes)
    steps = make_steps(run, layout)
    rows = layout.sharding("batch", None)
    shape = (run.train.global_batch_size, run.model.seq_len)
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    batch = {k: jax.ShapeDtypeStruct(shape, d, sharding=rows) for k, d in kinds.items()}
    return steps.train.lower(steps.abstract, batch).compile()


def test_chunks_hold_a_share_of_the_logits():
    temporary = {}
    for chunks in (1, 8):
        run = tiny_run(
            model={"vocab_size": 8192}, train={"global_batch_size": 16, "loss_chunks": chunks}
        )
        temporary[chunks] = compiled(run).memory_analysis().temp_size_in_bytes
    logits = 16 * 32 * 8192 * 4
    assert temporary[1] > 2 * logits  # the logits and their gradient
    assert temporary[1] - temporary[8] > 2 * logits * 3 / 4


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_the_table_is_reduced_once_however_many_chunks(tied):
    D, V = 64, 8192
    run = tiny_run(
        model={"vocab_size": V, "tied": tied}, train={"global_batch_size": 8, "loss_chunks": 8}
    )
    found = collectives(compiled(run, dp=4).as_text())
    tables = [c for c in found for shape in c.shapes if sorted(shape) == [D, V]]
    assert {c.kind for c in tables} == {"all-reduce"}
    assert not any(c.looped for c in tables)
    assert sum(c.times for c in tables) <= 2  # by way of the lookup, and of the logits


def test_chunks_that_do_not_fit_are_refused():
    run = tiny_run(train={"loss_chunks": 5})
    with pytest.raises(ConfigError, match=r"train\.loss_chunks=5 does not divide the 32 tokens.*8"):
        compiled(run)


def test_as_few_chunks_as_keep_the_logits_small():
    MiB = 2**20
    assert fewest_chunks(1024, 512 * MiB) == 1
    assert fewest_chunks(1024, 513 * MiB) == 2
    assert fewest_chunks(96, 5 * 512 * MiB) == 6
    assert fewest_chunks(7, 3 * 512 * MiB) == 7
