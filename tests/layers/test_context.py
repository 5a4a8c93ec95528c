"""Attention over split sequences: the numbers of one device, and the same work on each."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mlm_jax.layers.blockwise import Formula, blockwise_attention
from mlm_jax.layers.context import context_attention, half_blocks
from mlm_jax.layers.order import in_order, out_of_order, places
from mlm_jax.layout import Layout

B, T, N, K, H = 2, 48, 4, 2, 8
SLOW = pytest.mark.slow
PLAIN = Formula(scale=0.35)
BOTH_WAYS = PLAIN._replace(causal=False)
CAPPED = Formula(scale=0.5, softcap=1.5, window=11)


def layout_of(**sizes):
    count = int(np.prod([n for n in sizes.values() if isinstance(n, int)]))
    return Layout.create(jax.devices()[:count], **sizes)


def operands(dtype):
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in (N, K, K, N))
    segments = np.cumsum(rng.random((B, T)) < 0.1, axis=1, dtype=np.int32)
    return (q, k, v), g, jnp.asarray(segments)


def alone(formula, window, segments, q, k, v):
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    return blockwise_attention(q, k, v, formula, segments_BT=segments, window=window)


def split(layout, formula, window, segments, q, k, v):
    """The same of a split sequence, in the order of the text."""
    order = layout.order(T)
    q, k, v = (
        layout.constrain(x[:, order], "batch", "seq", dim, None)
        for x, dim in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads"))
    )
    segments = in_order(segments, layout)
    of = q, k.swapaxes(1, 2), v.swapaxes(1, 2), formula, layout
    return out_of_order(context_attention(*of, segments_BT=segments, window=window), layout)


def graded(f, *settings):
    def both(qkv, g, segments):
        out, vjp = jax.vjp(partial(f, *settings, segments), *qkv)
        return out, *vjp(g)

    return jax.jit(both)


CELLS = [  # layout, formula, a window that only the running program knows, packed documents
    ({"cp": 2}, PLAIN, None, False),
    pytest.param({"cp": 3}, PLAIN, None, True, marks=SLOW),
    pytest.param({"cp": 4}, CAPPED, None, True, marks=SLOW),
    pytest.param({"cp": 8}, PLAIN, 13, True, marks=SLOW),
    ({"dp": 2, "cp": 2, "tp": 2}, CAPPED, None, True),
    ({"cp": 4, "cp_attention": "all_gather"}, PLAIN, 13, True),
    pytest.param(
        {"fsdp": 2, "cp": 2, "tp": 2, "cp_attention": "all_gather"}, CAPPED, None, False, marks=SLOW
    ),
    ({"cp": 3}, BOTH_WAYS, None, True),
    pytest.param(
        {"dp": 2, "cp": 4, "cp_attention": "all_gather"}, BOTH_WAYS, None, True, marks=SLOW
    ),
]


@pytest.mark.parametrize(("sizes", "formula", "window", "packed"), CELLS, ids=str)
def test_split_attention_and_its_gradients_are_those_of_one_device(sizes, formula, window, packed):
    with jax.enable_x64(True):
        layout = layout_of(**sizes)
        qkv, g, segments = operands("float64")
        segments = segments if packed else None
        window = window and jnp.int32(window)
        expected = graded(alone, formula, window)(qkv, g, segments)
        found = graded(split, layout, formula, window)(qkv, g, segments)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)


def test_split_attention_in_bfloat16_is_as_exact_as_on_one_device():
    qkv, g, segments = operands("bfloat16")
    exact = graded(alone, PLAIN, None)(
        *jax.tree.map(lambda x: x.astype("float32"), (qkv, g)), segments
    )

    def errors(f, *settings):
        found = graded(f, *settings, PLAIN, None)(qkv, g, segments)
        assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
        pairs = zip(found, exact, strict=True)
        return np.array([np.square(np.asarray(a, "float32") - b).mean() ** 0.5 for a, b in pairs])

    once = errors(alone)
    for how in ("ring", "all_gather"):
        assert (errors(split, layout_of(cp=2, cp_attention=how)) < 1.1 * once).all()


@pytest.mark.parametrize("how", ["ring", pytest.param("all_gather", marks=SLOW)])
def test_an_island_around_it_may_split_cp_already(how):
    """As a pipeline does: all differentiation happens within."""
    layout = layout_of(dp=2, cp=2, tp=2, cp_attention=how)
    inside = layout.inside("cp")

    def island(qkv, g, segments):
        def one(x, qkv):
            q, k, v = qkv
            of = q + x, k.swapaxes(1, 2), v.swapaxes(1, 2), CAPPED, inside
            return context_attention(*of, segments_BT=segments), None

        def layers(*qkv):
            body = jax.checkpoint(one, prevent_cse=False)
            two = jax.tree.map(lambda x: jnp.stack([x, x]), qkv)
            return jax.lax.scan(body, jnp.zeros_like(qkv[0]), two)[0]

        out, vjp = jax.vjp(layers, *qkv)
        return (out, *vjp(g)), jnp.broadcast_to(places(inside, T // 2), (1, T // 2))

    def expected(q, k, v):
        once = alone(CAPPED, None, segments, q, k, v)
        return alone(CAPPED, None, segments, q + once, k, v)

    with jax.enable_x64(True):
        qkv, g, segments = operands("float64")
        own = P(None, "cp")
        wrapped = jax.shard_map(
            island, mesh=layout.mesh, in_specs=own, out_specs=own, axis_names={"cp"},
            check_vma=False,
        )  # fmt: skip
        order = layout.order(T)
        found, at = jax.jit(wrapped)(*jax.tree.map(lambda x: x[:, order], (qkv, g, segments)))
        out, vjp = jax.vjp(jax.jit(expected), *qkv)
        for one, other in zip(found, (out, *vjp(g)), strict=True):
            np.testing.assert_allclose(one, other[:, order], rtol=0, atol=1e-13)
    assert at[0].tolist() == order.tolist()


@pytest.mark.parametrize("n", [2, 3, 8])
def test_every_device_does_the_same_work_and_together_all_that_is_seen(n):
    done = []
    for me in range(n):
        own = [me, 2 * n - 1 - me]
        for step in range(n):
            there = (me - step) % n
            visiting = [there, 2 * n - 1 - there]
            found = half_blocks(me, there, at_home=step == 0, causal=True)
            assert len(found) == (3 if step == 0 else 2)  # whatever `me` is
            for half in found:
                query, key = own[int(half.query)], visiting[int(half.key)]
                assert half.diagonal == (query == key)
                done.append((query, key))
    assert sorted(done) == [(query, key) for query in range(2 * n) for key in range(query + 1)]


def test_only_operands_result_and_log_sum_exp_are_kept():
    layout = layout_of(cp=4)
    qkv, _, segments = operands("float32")
    f = partial(split, layout, PLAIN, None, segments)
    _, kept = jax.eval_shape(lambda *qkv: jax.vjp(f, *qkv), *qkv)
    sizes = sorted(x.size for x in jax.tree.leaves(kept) if x.dtype == jnp.float32)
    out, kv, lse = B * T * N * H, B * T * K * H, B * T * N
    assert sizes == sorted([out, out, kv, kv, lse])
