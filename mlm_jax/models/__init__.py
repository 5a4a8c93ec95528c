"""Models by family, and the one way to make one."""

from typing import Any

import jax
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.errors import ConfigError
from mlm_jax.layers.weight import materialise, renamed
from mlm_jax.layout import Layout
from mlm_jax.models.bert import Bert
from mlm_jax.models.gpt import Gpt
from mlm_jax.models.t5 import T5

FAMILIES = {"gpt": Gpt, "bert": Bert, "t5": T5}


def declare(cfg: ModelConfig, layout: Layout, remat: str = "none") -> Any:
    """The model with shapes for weights: made in milliseconds at any size."""
    if cfg.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError("model.dtype='float64' needs JAX_ENABLE_X64=1; or try float32")
    model = FAMILIES[cfg.family](cfg, layout, remat=remat)
    if layout.weights:
        nnx.update(model, renamed(nnx.state(model, nnx.Param), layout))
    return model


def build(cfg: ModelConfig, layout: Layout, seed: int = 0) -> Any:
    """The model with its first weights. A split weight is born split: no device holds it whole.

    Raises LayoutError where the layout does not fit the model.
    """
    layout = layout.fit(cfg)
    graphdef, declared = nnx.split(declare(cfg, layout), nnx.Param)
    shardings = layout.shardings(declared)
    params = jax.jit(lambda: materialise(declared, seed), out_shardings=shardings)()
    return nnx.merge(graphdef, params)


def relaid(model: Any, layout: Layout) -> Any:
    """The same model under another layout. Where that has layers elsewhere, its weights move."""
    if layout == model.layout:
        return model
    graphdef, _ = nnx.split(declare(model.cfg, layout, model.remat), nnx.Param)
    params = nnx.state(model, nnx.Param)
    if layout.axes("layer") != model.layout.axes("layer"):
        params = jax.device_put(params, layout.shardings(params))
    return nnx.merge(graphdef, params)
