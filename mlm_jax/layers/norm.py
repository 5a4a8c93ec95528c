"""Norms over the last dim, computed in float32 and returned in model.dtype."""

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.layers.weight import Constant, weight


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias (Ba et al. 2016).

    scale, bias  [D]  residual
    """

    def __init__(self, cfg: ModelConfig):
        self.scale = weight(cfg, Constant(1.0), residual=cfg.d_model)
        self.bias = weight(cfg, Constant(0.0), residual=cfg.d_model) if cfg.bias else None
        self.eps, self.dtype, self.wide = cfg.norm_eps, cfg.dtype, cfg.wide_dtype

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(self.wide)
        x = x - x.mean(-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang & Sennrich 2019).

    scale  [D]  residual
    """

    def __init__(self, cfg: ModelConfig):
        self.scale = weight(cfg, Constant(1.0), residual=cfg.d_model)
        self.eps, self.dtype, self.wide = cfg.norm_eps, cfg.dtype, cfg.wide_dtype

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(self.wide)
        y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(self.dtype)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
