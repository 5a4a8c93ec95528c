import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.layers.attention import View, attend_in_float64
from tests.conftest import tiny_batch, tiny_run

B, T, N, K, H = 2, 32, 4, 2, 16


def by_the_book(q, k, v, seen):
    """One head, one row, one query at a time; query head n reads key/value head n // (N / K)."""
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        at = np.flatnonzero(seen[b, t])
        scores = k[b, at, n // (N // K)] @ q[b, t, n] / math.sqrt(H)
        p = np.exp(scores - scores.max())
        out[b, t, n] = p / p.sum() @ v[b, at, n // (N // K)]
    return out


@pytest.mark.parametrize("packed", [False, True])
def test_both_kernels_are_attention_by_the_book(packed):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, heads, H)) for heads in (N, K, K))
    batch = tiny_batch(tiny_run(), packed=True)
    segments = batch["segments"][:B] if packed else np.zeros((B, T), int)
    seen = np.tri(T, dtype=bool) & (segments[:, :, None] == segments[:, None, :])
    expected = by_the_book(q, k, v, seen)
    cfg = tiny_run().model
    view = View.of(cfg, jnp.arange(T)[None], jnp.asarray(segments) if packed else None, slots=0)
    assert (view.mask_B1TS is None) == (not packed)
    how = {"mask": view.mask_B1TS, "is_causal": not packed, "implementation": "xla"}
    with jax.enable_x64(True):
        wide = attend_in_float64(*map(jnp.asarray, (q, k, v)), **how)
        np.testing.assert_allclose(wide, expected, atol=1e-14, rtol=0)
    narrow = jax.nn.dot_product_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), **how)
    np.testing.assert_allclose(narrow, expected, atol=2e-6, rtol=0)


def test_a_token_sees_the_slots_up_to_its_own():
    view = View.of(tiny_run().model, jnp.array([[2], [0]]), None, slots=5)
    assert view.mask_B1TS.shape == (2, 1, 1, 5)
    assert view.mask_B1TS[:, 0, 0].sum(-1).tolist() == [3, 1]
