import jax.numpy as jnp
import numpy as np

from mlm_jax.layers.rotary import rotary_angles, rotate

H = 8


def turned(x, positions, base=10000.0):
    angles = rotary_angles(jnp.asarray(positions)[None], H, base, "float32")
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
