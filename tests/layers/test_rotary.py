import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.config import ModelConfig
from mlm_jax.layers.rotary import rotary_angles, rotary_frequencies, rotate

H = 8


def turned(x, positions, base=10000.0):
    cfg = ModelConfig(positions="rotary", head_dim=H, rotary_base=base)
    angles = rotary_angles(cfg, jnp.asarray(positions)[None])
    return np.asarray(rotate(jnp.broadcast_to(x, (1, len(positions), 1, H)), angles))[0, :, 0]


def test_pairs_of_halves_turn_as_complex_numbers_do():
    x = np.random.default_rng(0).normal(size=H).astype(np.float32)
    got, base = turned(x, [0, 1, 7], base=500.0), 500.0
    z = (x[: H // 2] + 1j * x[H // 2 :])[None]
    z = z * np.exp(1j * np.array([[0], [1], [7]]) * base ** (-2 * np.arange(H // 2) / H))
    np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], -1), atol=1e-6)
    np.testing.assert_array_equal(got[0], x)


def test_scores_depend_on_distance_alone():
    q, k = np.random.default_rng(1).normal(size=(2, H)).astype(np.float32)
    near = turned(q, [5, 105]) * turned(k, [2, 102])
    np.testing.assert_allclose(*near.sum(-1), rtol=1e-4)
    assert abs(turned(q, [5]) @ turned(k, [3]).T - near[0].sum()) > 1e-2


SCALED = {  # transformers 5.23, LlamaConfig of head size 128 and base 500,000: six of 64 pairs
    "linear": [0.25, 0.00414011022, 0.000802861527, 0.000353553361, 6.8562047e-05, 6.13785176e-07],
    "llama3": [1.0, 0.0165604409, 0.00321144611, 0.000524846022, 3.4281024e-05, 3.06892588e-07],
    "yarn": [1.0, 0.011385303, 0.000869766576, 8.83883403e-05, 1.71405118e-05, 1.53446294e-07],
}


@pytest.mark.parametrize(
    ("kind", "settings", "length"),
    [
        ("linear", {"rope_factor": 4.0}, 1.0),
        ("llama3", {"rope_factor": 8.0}, 1.0),
        (
            "yarn",
            {"rope_factor": 16.0, "rope_original_seq_len": 4096, "rope_high": 32.0},
            1.27725887,
        ),
    ],
)
def test_scaled_frequencies_are_those_of_transformers(kind, settings, length):
    cfg = ModelConfig(positions="rotary", head_dim=128, rotary_base=500_000.0)
    cfg = dataclasses.replace(cfg, rope_scaling=kind, **settings)
    got = rotary_frequencies(cfg)[[0, 20, 28, 32, 40, 63]]
    np.testing.assert_allclose(got, SCALED[kind], rtol=1e-6)
    assert cfg.rope_length == pytest.approx(length, rel=1e-7)


def test_a_turned_pair_may_grow_longer():
    x = jnp.ones((1, 1, 1, H))
    angles = jnp.full((1, 1, H // 2), 0.3)
    np.testing.assert_allclose(rotate(x, angles, 1.5), 1.5 * rotate(x, angles), rtol=1e-6)
