import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.layers.blockwise import BLOCK, MOST_BLOCKS, Formula, Sight, blocks, blockwise_attention
from tests.conftest import tiny_layout, tiny_run

B, T, N, K, H = 2, 2 * BLOCK + 22, 4, 2, 16


PLAIN = Formula(scale=1 / math.sqrt(H))
FORMULAS = {
    "plain": PLAIN,
    "window": PLAIN._replace(window=70),
    "capped": Formula(scale=0.5, softcap=1.5, window=BLOCK + 3),
    "both ways": PLAIN._replace(causal=False),
}


def by_the_book(q, k, v, seen, formula):
    """One head, one row, one query at a time; query head n reads key/value head n // (N / K)."""
    q, k, v = map(np.asarray, (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        at = np.flatnonzero(seen[b, t])
        at = at[at > t - formula.window] if formula.window else at
        scores = formula.scale * k[b, at, n // (N // K)] @ q[b, t, n]
        if formula.softcap:
            scores = formula.softcap * np.tanh(scores / formula.softcap)
        p = np.exp(scores - scores.max())
        out[b, t, n] = p / p.sum() @ v[b, at, n // (N // K)]
    return out


def operands(dtype):
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=(B, T, heads, H)) for heads in (N, K, K, N))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v, g))


def documents(packed, formula):
    """What each token sees, bool [B, T, T]; and segments [B, T], or None."""
    segments = np.cumsum(np.random.default_rng(1).random((B, T)) < 0.05 * packed, axis=1)
    seen = segments[:, :, None] == segments[:, None, :]
    seen = seen & np.tri(T, dtype=bool) if formula.causal else seen
    return seen, segments if packed else None


@partial(jax.jit, static_argnames="formula")
def attended(q, k, v, segments, formula, window=None):
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    return blockwise_attention(q, k, v, formula, segments_BT=segments, window=window)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_attention_by_the_book(formula, packed):
    seen, segments = documents(packed, formula)
    with jax.enable_x64(True):
        q, k, v, _ = operands("float64")
        expected = by_the_book(q, k, v, seen, formula)
        got = attended(q, k, v, segments, formula)
        np.testing.assert_allclose(got, expected, atol=1e-13, rtol=0)
        # a window that only the running program knows
        window = formula.window and jnp.int32(formula.window)
        got = attended(q, k, v, segments, formula._replace(window=None), window)
        np.testing.assert_allclose(got, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_gradients_of_attention_are_those_of_the_formula(formula, packed):
    seen, segments = documents(packed, formula)
    seen = seen & ~np.tri(T, k=-(formula.window or T), dtype=bool)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * formula.scale
        if formula.softcap:
            scores = formula.softcap * jnp.tanh(scores / formula.softcap)
        p = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
        return jnp.einsum("BNTS,BSNH->BTNH", p, v)

    with jax.enable_x64(True):
        *qkv, g = operands("float64")
        expected = jax.jit(lambda *qkv: jax.vjp(plain, *qkv)[1](g))(*qkv)
        got = jax.vjp(lambda *qkv: attended(*qkv, segments, formula), *qkv)[1](g)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-13, rtol=0)
    *qkv, g = operands("bfloat16")
    got = jax.vjp(lambda *qkv: attended(*qkv, segments, formula), *qkv)[1](g)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(float), other, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("causal", [False, True])
def test_a_bias_and_keys_of_other_tokens(causal, rows):
    """As T5 has them: relative positions, and a decoder that reads a padded encoder."""
    S = T if causal else 40
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        q, k, v, g = (jnp.asarray(x) for x in operands("float64"))
        k, v = (x[:, :S].swapaxes(1, 2) for x in (k, v))
        bias = jnp.asarray(rng.normal(size=(rows, K, N // K, T, S)))
        real = jnp.asarray(rng.random((B, S)) < 0.7).at[:, 0].set(True).astype(jnp.int32)
        seen = np.tri(T, S, dtype=bool) | (not causal)
        seen = np.asarray(real == 1)[:, None] & seen

        def plain(q, k, v, bias):
            grouped = q.reshape(B, T, K, N // K, H)
            scores = PLAIN.scale * jnp.einsum("BTKGH,BKSH->BKGTS", grouped, k) + bias
            p = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf))
            return jnp.einsum("BKGTS,BKSH->BTKGH", p, v).reshape(q.shape)

        def ours(q, k, v, bias):
            segments = {"segments_BT": jnp.ones((B, T), jnp.int32), "key_segments_BS": real}
            formula = PLAIN._replace(causal=causal)
            return blockwise_attention(q, k, v, formula, **segments, bias_BKGTS=bias)

        found, expected = (
            jax.jit(lambda *of, f=f: (f(*of), *jax.vjp(f, *of)[1](g)))(q, k, v, bias)
            for f in (ours, plain)
        )
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=1e-13, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not tiny_layout(tiny_run()).has_cudnn(), reason="needs a GPU with cuDNN")
@pytest.mark.parametrize("window", [None, 70])
def test_cudnn_computes_what_the_float32_formula_does(window):
    """JAX_PLATFORMS=cuda python -m pytest -m gpu tests/layers"""
    formula = PLAIN._replace(window=window)
    local = window and (window - 1, 0)

    def cudnn(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, scale=formula.scale, is_causal=True, local_window_size=local,
            implementation="cudnn",
        )  # fmt: skip

    def graded(f, dtype):
        *qkv, g = operands(dtype)
        out, vjp = jax.vjp(f, *qkv)
        return [np.asarray(x, np.float32) for x in (out, *vjp(g))]

    expected = graded(lambda *qkv: attended(*qkv, None, formula), "float32")
    for one, other in zip(graded(cudnn, "bfloat16"), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=0.05, rtol=0.02)


def test_blocks_skip_what_no_query_sees():
    found = blocks(4 * BLOCK, 4 * BLOCK, diagonal=True, window=10, most=MOST_BLOCKS)
    assert [(r.start, s.start, s.stop) for r, s in found] == [
        (i * BLOCK, max(0, i * BLOCK - 9), (i + 1) * BLOCK) for i in range(4)
    ]
    long = 100 * BLOCK
    assert len(blocks(long, long, diagonal=True, window=None, most=MOST_BLOCKS)) == MOST_BLOCKS


@pytest.mark.parametrize("window", [None, 2])
def test_a_token_at_a_position_sees_the_slots_up_to_its_own(window):
    positions = np.array([[2], [0]])
    sight = Sight(jnp.asarray(positions), jnp.arange(5))
    formula = PLAIN._replace(window=window)
    seen = np.asarray(sight.of(slice(0, 1), slice(0, 5), formula))
    back = positions - np.arange(5)
    assert seen.shape == (2, 1, 1, 1, 5)
    assert (seen[:, 0, 0, 0] == (back >= 0) & (back < (window or 5))).all()
