"""Norms over the last dim, computed in float32 and returned in the input's dtype.

With model.norm_zero_centered the weight that is stored, and learned, is scale - 1.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.layers.weight import Constant, bias, weight

once_more = partial(jax.checkpoint, prevent_cse=False)  # backward keeps the input only


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias (Ba et al. 2016).

    scale, bias  [D]  residual, or the dim that is given
    """

    def __init__(self, cfg: ModelConfig, **dim: int):
        self.scale = scale(cfg, **dim)
        self.bias = bias(cfg, cfg.norm_bias, **dim)
        self.eps, self.offset = cfg.norm_eps, int(cfg.norm_zero_centered)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        @once_more
        def norm(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None) -> jax.Array:
            x = x_BTD.astype(scale_D.dtype)
            x = x - x.mean(-1, keepdims=True)
            y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * scale_D
            return (y if bias_D is None else y + bias_D).astype(x_BTD.dtype)

        scale_D = self.scale[...] + self.offset
        return norm(x_BTD, scale_D, None if self.bias is None else self.bias[...])


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang & Sennrich 2019).

    scale  [D]  residual, or the dim that is given
    """

    def __init__(self, cfg: ModelConfig, **dim: int):
        self.scale = scale(cfg, **dim)
        self.eps, self.offset = cfg.norm_eps, int(cfg.norm_zero_centered)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        @once_more
        def norm(x_BTD: jax.Array, scale_D: jax.Array) -> jax.Array:
            x = x_BTD.astype(scale_D.dtype)
            y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
            return (y * scale_D).astype(x_BTD.dtype)

        return norm(x_BTD, self.scale[...] + self.offset)


def scale(cfg: ModelConfig, **dim: int) -> nnx.Param:
    return weight(cfg, Constant(0.0 if cfg.norm_zero_centered else 1.0), **dim)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
