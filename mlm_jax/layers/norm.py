"""Norms over the last dim, computed in float32 and returned in the input's dtype."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.layers.weight import Constant, weight

once_more = partial(jax.checkpoint, prevent_cse=False)  # backward keeps the input only


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias (Ba et al. 2016).

    scale, bias  [D]  residual, or the dim that is given
    """

    def __init__(self, cfg: ModelConfig, **dim: int):
        self.scale = weight(cfg, Constant(1.0), **dim)
        self.bias = weight(cfg, Constant(0.0), **dim) if cfg.bias else None
        self.eps = cfg.norm_eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        @once_more
        def norm(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None) -> jax.Array:
            x = x_BTD.astype(scale_D.dtype)
            x = x - x.mean(-1, keepdims=True)
            y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * scale_D
            return (y if bias_D is None else y + bias_D).astype(x_BTD.dtype)

        return norm(x_BTD, self.scale[...], None if self.bias is None else self.bias[...])


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang & Sennrich 2019).

    scale  [D]  residual, or the dim that is given
    """

    def __init__(self, cfg: ModelConfig, **dim: int):
        self.scale = weight(cfg, Constant(1.0), **dim)
        self.eps = cfg.norm_eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        @once_more
        def norm(x_BTD: jax.Array, scale_D: jax.Array) -> jax.Array:
            x = x_BTD.astype(scale_D.dtype)
            y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
            return (y * scale_D).astype(x_BTD.dtype)

        return norm(x_BTD, self.scale[...])


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
