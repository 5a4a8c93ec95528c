import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.layers.mlp import Mlp
from mlm_jax.layout import is_weight, path_name
from tests.conftest import tiny_layout, tiny_run


def erf(x):
    return np.vectorize(math.erf)(x)


ACTIVATIONS = {
    "gelu": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: x / 2 * (1 + erf(x / math.sqrt(2))),
    "squared_relu": lambda x: np.maximum(x, 0) ** 2,
    "swiglu": lambda x: x / (1 + np.exp(-x)),
}
ACTIVATIONS["geglu"] = ACTIVATIONS["gelu"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_feed_forwards_are_by_the_book(name, bias):
    run = tiny_run(model={"activation": name, "bias": bias, "d_model": 8, "n_heads": 1})
    rng, w = np.random.default_rng(0), {}

    def fill(path, weight):
        w[path_name(path).split(".")[0]] = value = rng.normal(size=weight.shape)
        return weight.replace(jnp.asarray(value, jnp.float32))

    mlp = Mlp(run.model, tiny_layout(run))
    mlp = jax.tree_util.tree_map_with_path(fill, mlp, is_leaf=is_weight)
    x = rng.normal(size=(2, 3, 8))
    act, b = ACTIVATIONS[name], lambda name: w.get(f"{name}_bias", 0)
    up = x @ w["up"] + b("up")
    h = act(x @ w["gate"] + b("gate")) * up if "gate" in w else act(up)
    expected = h @ w["down"] + b("down")
    np.testing.assert_allclose(mlp(x.astype(np.float32)), expected, rtol=1e-4, atol=1e-4)
    assert len(w) == (3 if name.endswith("glu") else 2) * (2 if bias else 1)
