import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.layers.norm import NORMS
from mlm_jax.layout import is_weight, path_name
from tests.conftest import tiny_run

D, EPS = 64, 1e-3
X, SCALE, BIAS = np.random.default_rng(0).normal(3.0, 2.0, size=(3, D)).astype(np.float32)
EXPECTED = {
    "layernorm": (X - X.mean()) / np.sqrt(X.var() + EPS) * SCALE + BIAS,
    "rmsnorm": X / np.sqrt((X**2).mean() + EPS) * SCALE,
}


def norm(name, **model):
    cfg = tiny_run(model={"norm": name, "norm_eps": EPS, **model}).model
    values = {"scale": SCALE, "bias": BIAS}

    def fill(path, w):
        return w.replace(jnp.asarray(values[path_name(path)]))

    return jax.tree_util.tree_map_with_path(fill, NORMS[name](cfg), is_leaf=is_weight)


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_by_the_book(name):
    got = norm(name)(X[None, None])[0, 0]
    np.testing.assert_allclose(got, EXPECTED[name], rtol=2e-5, atol=1e-5)


def test_a_model_without_biases_has_none_in_its_norms():
    np.testing.assert_allclose(
        norm("layernorm", bias=False)(X[None, None])[0, 0],
        EXPECTED["layernorm"] - BIAS, rtol=2e-5, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms_compute_in_float32_and_answer_in_the_compute_dtype(name):
    x = (1000 + X).astype(jnp.bfloat16)  # in bfloat16 the mean alone would be off by 4
    got = norm(name, dtype="bfloat16")(x[None, None])
    assert got.dtype == jnp.bfloat16
    wide = norm(name)(x.astype(np.float32)[None, None])
    np.testing.assert_array_equal(got, wide.astype(jnp.bfloat16))
