"""Feed-forward layers."""

import math
from functools import partial

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mlm_jax.config import ModelConfig
from mlm_jax.layers.weight import Normal, bias, linear, linear_out, weight
from mlm_jax.layout import Layout


class Mlp(nnx.Module):
    """down(act(up(x))): GPT-2's feed-forward.

    up     [D, F]   embed, mlp            columns over tp
    down   [F, D]   mlp_inner, residual   rows over tp

    Forward under tp costs one all-reduce, of the output.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout):
        D, F = cfg.d_model, cfg.d_mlp
        self.up = weight(cfg, Normal(cfg.init_std), embed=D, mlp=F)
        self.up_bias = bias(cfg, mlp=F)
        # GPT-2: projections that add to the residual stream start smaller in deeper models.
        std = cfg.init_std / math.sqrt(2 * cfg.n_layers)
        self.down = weight(cfg, Normal(std), mlp_inner=F, residual=D)
        self.down_bias = bias(cfg, residual=D)
        self.layout, self.activation = layout, ACTIVATIONS[cfg.activation]

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up_BTF = checkpoint_name(linear(x_BTD, self.up, self.up_bias), "mlp_up")
        h_BTF = self.layout.constrain(self.activation(up_BTF), "batch", "seq", "mlp")
        out_BTD = linear_out(h_BTF, self.down, self.down_bias, self.layout)
        return checkpoint_name(out_BTD, "block_out")


class GatedMlp(nnx.Module):
    """down(act(gate(x)) * up(x)): Llama's feed-forward (Shazeer 2020).

    gate, up   [D, F]   embed, mlp            columns over tp
    down       [F, D]   mlp_inner, residual   rows over tp
    """

    def __init__(self, cfg: ModelConfig, layout: Layout):
        D, F = cfg.d_model, cfg.d_mlp
        self.gate = weight(cfg, Normal(cfg.init_std), embed=D, mlp=F)
        self.gate_bias = bias(cfg, mlp=F)
        self.up = weight(cfg, Normal(cfg.init_std), embed=D, mlp=F)
        self.up_bias = bias(cfg, mlp=F)
        std = cfg.init_std / math.sqrt(2 * cfg.n_layers)
        self.down = weight(cfg, Normal(std), mlp_inner=F, residual=D)
        self.down_bias = bias(cfg, residual=D)
        self.layout, self.activation = layout, ACTIVATIONS[cfg.activation]

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = checkpoint_name(linear(x_BTD, self.gate, self.gate_bias), "mlp_up")
        up_BTF = checkpoint_name(linear(x_BTD, self.up, self.up_bias), "mlp_up")
        h_BTF = self.layout.constrain(self.activation(gate_BTF) * up_BTF, "batch", "seq", "mlp")
        out_BTD = linear_out(h_BTF, self.down, self.down_bias, self.layout)
        return checkpoint_name(out_BTD, "block_out")


ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=True),
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "swiglu": jax.nn.silu,
}
MLPS = {"gelu": Mlp, "gelu_exact": Mlp, "swiglu": GatedMlp}
