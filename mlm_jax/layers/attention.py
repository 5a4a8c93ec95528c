"""Self-attention: heads, groups of them, packed documents, and the kernel that computes it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mlm_jax.config import ModelConfig
from mlm_jax.errors import ConfigError
from mlm_jax.layers.cache import Cache
from mlm_jax.layers.causal import causal_attention
from mlm_jax.layers.rotary import rotary_angles, rotate
from mlm_jax.layers.weight import Normal, bias, linear, linear_out, weight
from mlm_jax.layout import Layout


class View(NamedTuple):
    """What a token may look at, computed once for all layers.

    positions [B, T] int32; angles [B, T, H/2] or None; mask bool [B, 1, T, S], True is seen, or
    None: everything before, and itself.
    """

    positions_BT: jax.Array
    angles_BTh: jax.Array | None
    mask_B1TS: jax.Array | None

    @classmethod
    def of(
        cls, cfg: ModelConfig, positions_BT: jax.Array, segments_BT: jax.Array | None, slots: int
    ) -> "View":
        """segments_BT: a document's tokens share a number. slots: keys in a cache, or 0."""
        angles = mask = None
        if cfg.positions == "rotary":
            angles = rotary_angles(positions_BT, cfg.head_dim, cfg.rotary_base, cfg.wide_dtype)
        if slots:
            mask = (jnp.arange(slots) <= positions_BT[..., None])[:, None]
        elif segments_BT is not None:
            T = segments_BT.shape[1]
            same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
            mask = (same_BTS & jnp.tri(T, dtype=bool))[:, None]
        return cls(positions_BT, angles, mask)


class Attention(nnx.Module):
    """o(attention(q(x), k(x), v(x))), each query head with the key/value head of its group.

    q      [D, N H]   embed, heads            columns over tp
    k, v   [D, K H]   embed, kv_heads         columns over tp, or replicated where K < tp
    o      [N H, D]   attn_inner, residual    rows over tp

    Forward under tp costs one all-reduce, of the output.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout):
        D, NH, KH = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        self.q = weight(cfg, Normal(cfg.init_std), embed=D, heads=NH)
        self.k = weight(cfg, Normal(cfg.init_std), embed=D, kv_heads=KH)
        self.v = weight(cfg, Normal(cfg.init_std), embed=D, kv_heads=KH)
        std = cfg.init_std / math.sqrt(2 * cfg.n_layers)
        self.o = weight(cfg, Normal(std), attn_inner=NH, residual=D)
        self.q_bias, self.o_bias = bias(cfg, heads=NH), bias(cfg, residual=D)
        self.k_bias, self.v_bias = bias(cfg, kv_heads=KH), bias(cfg, kv_heads=KH)
        self.layout, self.kernel = layout, cfg.attention
        self.n_heads, self.head_dim = cfg.n_heads, cfg.head_dim

    def __call__(
        self, x_BTD: jax.Array, view: View, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        q_BTNH = self._heads(x_BTD, self.q, self.q_bias, "heads")
        k_BTKH = self._heads(x_BTD, self.k, self.k_bias, "kv_heads")
        v_BTKH = self._heads(x_BTD, self.v, self.v_bias, "kv_heads")
        if view.angles_BTh is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, view.angles_BTh), rotate(k_BTKH, view.angles_BTh)
        k_BSKH, v_BSKH = k_BTKH, v_BTKH
        if cache is not None:
            cache = cache.write(layer, view.positions_BT, k_BTKH, v_BTKH, self.layout)
            k_BSKH, v_BSKH = cache.k_LBSKH[layer], cache.v_LBSKH[layer]
        if self.layout.spec("heads") != self.layout.spec("kv_heads"):  # k, v whole on each device
            k_BSKH, v_BSKH = self._repeat(k_BSKH), self._repeat(v_BSKH)
        if self._uses_cudnn(view, cache is not None, x_BTD.dtype):
            out_BTNH = jax.nn.dot_product_attention(
                q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn"
            )
        else:
            out_BTNH = causal_attention(q_BTNH, k_BSKH, v_BSKH, view.mask_B1TS)
        out_BTE = out_BTNH.reshape(*out_BTNH.shape[:2], -1)
        out_BTE = self.layout.constrain(out_BTE, "batch", "seq", "heads")
        out_BTD = linear_out(out_BTE, self.o, self.o_bias, self.layout)
        return checkpoint_name(out_BTD, "block_out"), cache

    def _heads(self, x: jax.Array, w: nnx.Param, b: nnx.Param | None, dim: str) -> jax.Array:
        y = linear(x, w, b).reshape(*x.shape[:2], -1, self.head_dim)
        return checkpoint_name(self.layout.constrain(y, "batch", "seq", dim, None), "qkv")

    def _repeat(self, x_BSKH: jax.Array) -> jax.Array:
        x_BSNH = jnp.repeat(x_BSKH, self.n_heads // x_BSKH.shape[2], axis=2)
        return self.layout.constrain(x_BSNH, "batch", None, "heads", None)

    def _uses_cudnn(self, view: View, cached: bool, dtype: jnp.dtype) -> bool:
        """Whether cuDNN's kernel computes this; it is given no mask, so it must need none."""
        masked = view.mask_B1TS is not None
        if self.kernel == "cudnn" and masked and not cached:
            raise ConfigError(
                "model.attention='cudnn' would ignore the mask between packed documents; try"
                " model.attention='auto'"
            )
        size_fits = self.head_dim % 8 == 0 and self.head_dim <= 128  # of cuDNN on every GPU
        fits = not masked and dtype == jnp.bfloat16 and size_fits and self.layout.on_gpu()
        return not cached and (self.kernel == "cudnn" or (self.kernel == "auto" and fits))
