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
    """down(act(up(x))), or with a gate down(act(gate(x)) * up(x)) (Shazeer 2020).

    gate, up   [D, F]   embed, mlp            columns over tp
    down       [F, D]   mlp_inner, residual   rows over tp

    Forward under tp costs one all-reduce, of the output.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout):
        D, F = cfg.d_model, cfg.d_mlp
        self.up = weight(cfg, Normal(cfg.init_std), embed=D, mlp=F)
        self.up_bias = bias(cfg, cfg.mlp_bias, mlp=F)
        self.gate = weight(cfg, Normal(cfg.init_std), embed=D, mlp=F) if cfg.gated else None
        self.gate_bias = bias(cfg, cfg.mlp_bias and cfg.gated, mlp=F)
        # GPT-2: projections that add to the residual stream start smaller in deeper models.
        std = cfg.init_std / math.sqrt(2 * cfg.n_layers)
        self.down = weight(cfg, Normal(std), mlp_inner=F, residual=D)
        self.down_bias = bias(cfg, cfg.mlp_bias, residual=D)
        self.layout, self.activation = layout, ACTIVATIONS[cfg.activation]

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up_BTF = checkpoint_name(linear(x_BTD, self.up, self.up_bias), "mlp_up")
        gate_BTF = None
        if self.gate is not None:
            gate_BTF = checkpoint_name(linear(x_BTD, self.gate, self.gate_bias), "mlp_up")
        h_BTF = self._activated(up_BTF, gate_BTF)
        h_BTF = self.layout.constrain(h_BTF, "batch", "seq", "mlp")
        out_BTD = linear_out(h_BTF, self.down, self.down_bias, self.layout)
        return checkpoint_name(out_BTD, "block_out")

    @partial(jax.checkpoint, prevent_cse=False, static_argnums=0)  # keeps its operands only
    def _activated(self, up_BTF: jax.Array, gate_BTF: jax.Array | None) -> jax.Array:
        return self.activation(up_BTF) if gate_BTF is None else self.activation(gate_BTF) * up_BTF


ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=True),
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jax.numpy.square(jax.nn.relu(x)),  # So et al. 2021
    "swiglu": jax.nn.silu,
    "geglu": partial(jax.nn.gelu, approximate=True),
}
