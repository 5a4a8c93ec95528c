"""Buckets of distances beside transformers' own, and what they add to scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.config import ModelConfig
from mlm_jax.layers.relative import buckets, cached_bias, relative_bias

KINDS = [(32, 128), (32, 64), (8, 20), (16, 1000), (4, 8)]


def cfg_of(kind: tuple[int, int] = (8, 20), **more) -> ModelConfig:
    sizes = {"relative_buckets": kind[0], "relative_distance": kind[1]}
    return ModelConfig(family="t5", positions="relative", **sizes, **more)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_buckets_are_transformers(kind, bidirectional):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = np.arange(-3000, 3000)
    theirs = t5.T5Attention._relative_position_bucket(
        torch.from_numpy(distance), bidirectional, *kind
    )
    ours = buckets(distance, cfg_of(kind), bidirectional=bidirectional)
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("T", "S"),
    [
        (7, 3),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((5, 5), (1, 7), (40, 64), (1, 1))),
    ],
)
def test_the_bias_is_the_table_at_each_distance_and_so_is_its_gradient(T, S, bidirectional):
    cfg = cfg_of()
    table = jax.random.normal(jax.random.key(0), (8, 4))
    bucket_TS = buckets(np.arange(S) - np.arange(T)[:, None], cfg, bidirectional=bidirectional)
    ours = lambda table: relative_bias(table, cfg, T, S, bidirectional=bidirectional)  # noqa: E731
    plain = lambda table: table[bucket_TS].transpose(2, 0, 1)[None]  # noqa: E731
    got, back = jax.vjp(ours, table)
    expected, expected_back = jax.vjp(plain, table)
    np.testing.assert_array_equal(got, expected)
    g = jax.random.normal(jax.random.key(1), (1, 4, T, S))
    np.testing.assert_allclose(back(g)[0], expected_back(g)[0], atol=1e-4, rtol=0)


def test_in_a_cache_queries_are_where_they_say():
    cfg, table = cfg_of(), jax.random.normal(jax.random.key(0), (8, 4))
    whole = relative_bias(table, cfg, 30, 30, bidirectional=False)[0]
    positions = np.array([[3, 4], [29, 0]])
    got = cached_bias(table, cfg, jnp.asarray(positions), 30)
    assert got.shape == (2, 4, 2, 30)
    for row, places in zip(got, positions, strict=True):
        np.testing.assert_array_equal(row, whole[:, places])
