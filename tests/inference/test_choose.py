"""Choosing a token from hand-made logits."""

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.inference.sampling import Sampling, choose

LOGITS = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))


def drawn(
    sampling: Sampling, seen: tuple[int, ...] = (), n: int = 4000, greedy=False
) -> np.ndarray:
    """Shares of each token in n draws."""
    logits = jnp.asarray(np.repeat(LOGITS, n, axis=0))
    had = jnp.zeros(logits.shape, bool).at[:, list(seen)].set(True)
    tokens = choose(logits, had, sampling, jax.random.split(jax.random.key(0), n), greedy)
    return np.bincount(np.asarray(tokens), minlength=4) / n


def test_sampling_follows_the_probabilities():
    np.testing.assert_allclose(drawn(Sampling()), [0.4, 0.3, 0.2, 0.1], atol=0.03)


def test_temperature_sharpens():
    expected = np.array([0.4, 0.3, 0.2, 0.1]) ** 2
    np.testing.assert_allclose(drawn(Sampling(0.5)), expected / expected.sum(), atol=0.03)


def test_top_k_keeps_the_likeliest():
    np.testing.assert_allclose(drawn(Sampling(top_k=2)), [4 / 7, 3 / 7, 0, 0], atol=0.03)
    assert drawn(Sampling(top_k=1))[0] == 1


def test_top_p_keeps_the_fewest_that_hold_the_share():
    np.testing.assert_allclose(drawn(Sampling(top_p=0.65)), [4 / 7, 3 / 7, 0, 0], atol=0.03)
    np.testing.assert_allclose(drawn(Sampling(top_p=0.75)), [4 / 9, 3 / 9, 2 / 9, 0], atol=0.03)
    assert drawn(Sampling(top_p=1e-6))[0] == 1


def test_greedy_takes_the_likeliest_and_the_penalty_moves_it():
    assert drawn(Sampling(0), greedy=True)[0] == 1
    assert drawn(Sampling(0, repetition_penalty=2.0), seen=(0,), greedy=True)[1] == 1
