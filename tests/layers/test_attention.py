import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.layers.attention import View
from mlm_jax.layers.causal import BLOCK, causal_attention
from tests.conftest import tiny_run

B, T, N, K, H = 2, 2 * BLOCK + 22, 4, 2, 16


def by_the_book(q, k, v, seen):
    """One head, one row, one query at a time; query head n reads key/value head n // (N / K)."""
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        at = np.flatnonzero(seen[b, t])
        scores = k[b, at, n // (N // K)] @ q[b, t, n] / math.sqrt(H)
        p = np.exp(scores - scores.max())
        out[b, t, n] = p / p.sum() @ v[b, at, n // (N // K)]
    return out


def operands(dtype):
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=(B, T, heads, H)) for heads in (N, K, K, N))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v, g))


def mask_of(packed):
    """What each token sees, bool [B, T, T]; and the mask that a View makes of it, or None."""
    segments = np.cumsum(np.random.default_rng(1).random((B, T)) < 0.05 * packed, axis=1)
    seen = np.tri(T, dtype=bool) & (segments[:, :, None] == segments[:, None, :])
    view = View.of(tiny_run().model, jnp.arange(T)[None], segments if packed else None, slots=0)
    assert (view.mask_B1TS is None) == (not packed)
    return seen, view.mask_B1TS


@pytest.mark.parametrize("packed", [False, True])
def test_attention_by_the_book(packed):
    seen, mask = mask_of(packed)
    with jax.enable_x64(True):
        q, k, v, _ = operands("float64")
        got = causal_attention(q, k, v, mask)
        np.testing.assert_allclose(got, by_the_book(q, k, v, seen), atol=1e-13, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_attention_are_those_of_the_formula(packed):
    seen, mask = mask_of(packed)

    def formula(q, k, v):
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / math.sqrt(H)
        p = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
        return jnp.einsum("BNTS,BSNH->BTNH", p, v)

    with jax.enable_x64(True):
        *qkv, g = operands("float64")
        expected = jax.vjp(formula, *qkv)[1](g)
        got = jax.vjp(lambda *qkv: causal_attention(*qkv, mask), *qkv)[1](g)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-13, rtol=0)
    *qkv, g = operands("bfloat16")
    got = jax.vjp(lambda *qkv: causal_attention(*qkv, mask), *qkv)[1](g)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(float), other, atol=0.05, rtol=0.02)


def test_a_token_sees_the_slots_up_to_its_own():
    view = View.of(tiny_run().model, jnp.array([[2], [0]]), None, slots=5)
    assert view.mask_B1TS.shape == (2, 1, 1, 5)
    assert view.mask_B1TS[:, 0, 0].sum(-1).tolist() == [3, 1]
