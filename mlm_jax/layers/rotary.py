"""Rotary position embedding (Su et al. 2021), the halves rotated as in Llama and Megatron-LM.

With model.rotary_share only the first numbers of a head rotate, R of H (GPT-NeoX).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.config import ModelConfig


def rotary_angles(cfg: ModelConfig, positions_BT: jax.Array, *, local: bool = False) -> jax.Array:
    """Angles [B, T, R/2], radians: position times the frequency of the pair.

    local: of layers with a window, by model.rotary_local_base.
    """
    frequencies = rotary_frequencies(cfg)
    if local and cfg.rotary_local_base:
        frequencies = unscaled_frequencies(cfg.rotary_local_base, cfg.rotary_dim)
    frequencies = jnp.asarray(frequencies, cfg.wide_dtype)
    return positions_BT[..., None].astype(cfg.wide_dtype) * frequencies


def unscaled_frequencies(base: float, n: int) -> np.ndarray:
    """Radians a token of each pair of n numbers, float64 [n/2]: 1 / base^(2i/n)."""
    return base ** -(np.arange(0, n, 2) / n)


def rotary_frequencies(cfg: ModelConfig) -> np.ndarray:
    """The same of a model, [R/2], scaled for longer contexts.

    linear: all slowed down by the factor (Chen et al. 2023). llama3: only wavelengths longer than
    1 / rope_low of the original context, in part from 1 / rope_high on (Grattafiori et al. 2024).
    yarn: as many turns in the original context decide: below rope_low all, above rope_high none
    (Peng et al. 2023, section 3.2, as Megatron-LM and transformers have it).
    """
    R, factor, trained = cfg.rotary_dim, cfg.rope_factor, cfg.rope_original_seq_len
    frequencies = unscaled_frequencies(cfg.rotary_base, R)
    if cfg.rope_scaling == "linear":
        return frequencies / factor
    if cfg.rope_scaling == "llama3":
        turns = trained * frequencies / (2 * math.pi)
        keep = np.clip((turns - cfg.rope_low) / (cfg.rope_high - cfg.rope_low), 0, 1)
    elif cfg.rope_scaling == "yarn":

        def pair(turns: float) -> float:
            """The pair that turns so often in the original context."""
            return R * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(cfg.rotary_base))

        first = max(math.floor(pair(cfg.rope_high)), 0)
        last = min(math.ceil(pair(cfg.rope_low)), R - 1)
        keep = 1 - np.clip((np.arange(R // 2) - first) / max(last - first, 1e-3), 0, 1)
    else:
        return frequencies
    return frequencies * keep + frequencies / factor * (1 - keep)


def rotate(x_BTNH: jax.Array, angles_BTh: jax.Array, length: float = 1.0) -> jax.Array:
    """Each pair (x_i, x_{i + R/2}) turned by its angle, and made `length` times as long.

    In the angles' dtype, returned in x's. Numbers of a head beyond R stay as they are.
    """
    cos, sin = (length * f(angles_BTh)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    R = 2 * angles_BTh.shape[-1]
    first, second = jnp.split(x_BTNH[..., :R].astype(angles_BTh.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x_BTNH.dtype)
    return turned if x_BTNH.shape[-1] == R else jnp.concatenate([turned, x_BTNH[..., R:]], axis=-1)
