"""Self-attention: heads, groups of them, packed documents, and the kernel that computes it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mlm_jax.config import ModelConfig
from mlm_jax.errors import ConfigError
from mlm_jax.layers.blockwise import Formula, blockwise_attention
from mlm_jax.layers.cache import Cache
from mlm_jax.layers.context import context_attention
from mlm_jax.layers.cudnn import cudnn_attention
from mlm_jax.layers.norm import NORMS
from mlm_jax.layers.rotary import rotary_angles, rotate
from mlm_jax.layers.weight import Normal, bias, linear, linear_out, weight
from mlm_jax.layout import Layout


class View(NamedTuple):
    """What a token is to others, computed once for all layers.

    positions int32 [B, T]; angles [B, T, R/2] or None, R of a head's numbers rotate; segments int32
    [B, T]: tokens of a document share a number; None: a row is one. places int32 [T]: of tokens in
    their rows, by which dropout draws: positions begin again with a document. types int32 [B, T]:
    kinds of token (model.token_types), or None. local_angles: of layers with a window, where those
    have their own, or None. bias [1 or B, N, T, S]: added to scores, or None.
    memory: what an encoder has read (models.t5), or None.
    """

    positions_BT: jax.Array
    angles_BTh: jax.Array | None
    segments_BT: jax.Array | None
    places_T: jax.Array
    types_BT: jax.Array | None = None
    local_angles_BTh: jax.Array | None = None
    bias_BNTS: jax.Array | None = None
    memory: Any = None

    @classmethod
    def of(
        cls, cfg: ModelConfig, positions_BT: jax.Array, segments_BT: jax.Array | None = None,
        places_T: jax.Array | None = None, types_BT: jax.Array | None = None,
    ) -> "View":  # fmt: skip
        angles = rotary_angles(cfg, positions_BT) if cfg.positions == "rotary" else None
        local = rotary_angles(cfg, positions_BT, local=True) if cfg.rotary_local_base else None
        places_T = jnp.arange(positions_BT.shape[1]) if places_T is None else places_T
        return cls(positions_BT, angles, segments_BT, places_T, types_BT, local)


class Attention(nnx.Module):
    """o(attention(q(x), k(x), v(x))), each query head with the key/value head of its group.

    q             [D, N H]   embed, heads            columns over tp
    k, v          [D, K H]   embed, kv_heads         columns over tp, or replicated where K < tp
    o             [N H, D]   attn_inner, residual    rows over tp
    q_norm, k_norm  [H]      head_dim                with model.qk_norm (Henry et al. 2020)

    Forward under tp costs one all-reduce, of the output.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout, causal: bool | None = None):
        if cfg.attention == "cudnn" and layout.context > 1:
            raise ConfigError(
                f"model.attention='cudnn' sees no sequence that layout.cp={layout.context} splits;"
                " try model.attention='auto', or layout.cp=1"
            )
        D, NH, KH = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        self.q = weight(cfg, Normal(cfg.init_std), embed=D, heads=NH)
        self.k = weight(cfg, Normal(cfg.init_std), embed=D, kv_heads=KH)
        self.v = weight(cfg, Normal(cfg.init_std), embed=D, kv_heads=KH)
        std = cfg.init_std / math.sqrt(2 * cfg.n_layers)
        self.o = weight(cfg, Normal(std), attn_inner=NH, residual=D)
        self.q_bias = bias(cfg, cfg.qkv_bias, heads=NH)
        self.k_bias = bias(cfg, cfg.qkv_bias, kv_heads=KH)
        self.v_bias = bias(cfg, cfg.qkv_bias, kv_heads=KH)
        self.o_bias = bias(cfg, cfg.o_bias, residual=D)
        norm = NORMS[cfg.norm]
        self.q_norm = norm(cfg, head_dim=cfg.head_dim) if cfg.qk_norm else None
        self.k_norm = norm(cfg, head_dim=cfg.head_dim) if cfg.qk_norm else None
        scale = cfg.attention_scale
        scale = 1 / math.sqrt(cfg.head_dim) if scale is None else scale
        self.formula = Formula(
            scale, cfg.attention_softcap, cfg.window, cfg.causal if causal is None else causal
        )
        self.cfg, self.layout = cfg, layout

    def __call__(
        self, x_BTD: jax.Array, view: View, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        q_BTNH = self._heads(x_BTD, self.q, self.q_bias, "heads")
        k_BTKH = self._heads(x_BTD, self.k, self.k_bias, "kv_heads")
        v_BTKH = self._heads(x_BTD, self.v, self.v_bias, "kv_heads")
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if view.angles_BTh is not None:
            angles_BTh = view.angles_BTh
            if view.local_angles_BTh is not None:
                angles_BTh = jnp.where(self._sees_all(layer), angles_BTh, view.local_angles_BTh)
            q_BTNH, k_BTKH = (self._rotated(x, angles_BTh, layer) for x in (q_BTNH, k_BTKH))
        if cache is not None:
            cache = cache.write(layer, view.positions_BT, k_BTKH, v_BTKH, self.layout)
            k_BKSH, v_BKSH = cache.read(layer)
        else:
            k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
        k_BKSH, v_BKSH = self._repeat(k_BKSH), self._repeat(v_BKSH)
        out_BTNH = self._attend(q_BTNH, k_BKSH, v_BKSH, view, cache is not None, layer)
        return self._written(out_BTNH), cache

    def _written(self, out_BTNH: jax.Array) -> jax.Array:
        out_BTE = out_BTNH.reshape(*out_BTNH.shape[:2], -1)
        out_BTE = self.layout.constrain(out_BTE, "batch", "seq", "heads")
        out_BTD = linear_out(out_BTE, self.o, self.o_bias, self.layout)
        return checkpoint_name(out_BTD, "block_out")

    def _heads(self, x: jax.Array, w: nnx.Param, b: nnx.Param | None, dim: str) -> jax.Array:
        y = linear(x, w, b).reshape(*x.shape[:2], -1, self.cfg.head_dim)
        return checkpoint_name(self.layout.constrain(y, "batch", "seq", dim, None), "qkv")

    def _rotated(self, x: jax.Array, angles_BTh: jax.Array, layer: jax.Array) -> jax.Array:
        turned = rotate(x, angles_BTh, self.cfg.rope_length)
        every = self.cfg.nope_every  # every so many layers, one without positions
        return turned if every is None else jnp.where((layer + 1) % every == 0, x, turned)

    def _sees_all(self, layer: jax.Array) -> jax.Array | bool:
        """Whether a layer has no window, in a model where others have one."""
        every = self.cfg.global_every
        return (layer + 1) % every == 0 if every else False

    def _repeat(self, x_BKSH: jax.Array) -> jax.Array:
        """Where they are whole on each device, so many that it has those its query heads read."""
        if self.layout.spec("heads") == self.layout.spec("kv_heads"):
            return x_BKSH
        K = x_BKSH.shape[1]
        x = jnp.repeat(x_BKSH, math.lcm(K, self.layout.ways("heads")) // K, axis=1)
        return self.layout.constrain(x, "batch", "heads", None, None)

    def _attend(
        self, q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, view: View, cached: bool,
        layer: jax.Array,
    ) -> jax.Array:  # fmt: skip
        formula, window = self.formula, None
        if self.cfg.global_every and formula.window:  # it depends on the layer
            everything = jnp.int32(jnp.iinfo(jnp.int32).max)
            window = jnp.where(self._sees_all(layer), everything, formula.window)
            formula = formula._replace(window=None)
        of, segments, bias = (q_BTNH, k_BKSH, v_BKSH, formula), view.segments_BT, view.bias_BNTS
        if bias is not None:
            bias = bias.reshape(len(bias), k_BKSH.shape[1], -1, *bias.shape[2:])
        more: Any = {"window": window, "bias_BKGTS": bias}
        if cached:
            return blockwise_attention(*of, positions_BT=view.positions_BT, **more)
        if self.layout.context > 1:
            return context_attention(*of, self.layout, segments_BT=segments, window=window)
        if not self._uses_cudnn(view, q_BTNH.dtype):
            return blockwise_attention(*of, segments_BT=segments, **more)
        k_BSKH, v_BSKH = k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)
        return cudnn_attention(q_BTNH, k_BSKH, v_BSKH, formula, self.layout)

    def _uses_cudnn(self, view: View, dtype: jnp.dtype) -> bool:
        """Whether cuDNN's kernel computes this; it is given no segments, so there must be none."""
        cfg, packed = self.cfg, view.segments_BT is not None
        if cfg.attention == "cudnn" and packed:
            raise ConfigError(
                "model.attention='cudnn' would ignore the mask between packed documents; try"
                " model.attention='auto'"
            )
        size_fits = cfg.head_dim % 8 == 0 and cfg.head_dim <= 128  # of cuDNN on every GPU
        biased = view.bias_BNTS is not None
        plain = not (packed or biased or cfg.attention_softcap or cfg.global_every)
        fits = plain and dtype == jnp.bfloat16 and size_fits and self.layout.has_cudnn()
        return fits and cfg.attention != "xla"


class CrossAttention(Attention):
    """What a decoder's tokens see of what an encoder has read: everything but its padding.

    The weights of Attention, of which k and v read the encoder's states.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout):
        super().__init__(cfg, layout, causal=False)

    def keys(self, h_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, K, S, H] of an encoder's states."""
        k_BSKH = self._heads(h_BSD, self.k, self.k_bias, "kv_heads")
        v_BSKH = self._heads(h_BSD, self.v, self.v_bias, "kv_heads")
        return k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)

    def look(
        self, x_BTD: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, segments_BS: jax.Array
    ) -> jax.Array:
        """segments: 1, or 0 for padding. Of more rows x than B, neighbours read the same one."""
        q_BTNH = self._heads(x_BTD, self.q, self.q_bias, "heads")
        shape, B = q_BTNH.shape, len(k_BKSH)
        q_BTNH = q_BTNH.reshape(B, -1, *shape[2:])
        out_BTNH = blockwise_attention(
            q_BTNH, self._repeat(k_BKSH), self._repeat(v_BKSH), self.formula,
            segments_BT=jnp.ones(q_BTNH.shape[:2], jnp.int32), key_segments_BS=segments_BS,
        )  # fmt: skip
        return self._written(out_BTNH.reshape(shape))
