"""config.json of Hugging Face's models, read into a ModelConfig and written from one.

What our nouns cannot express is refused, on the way in and on the way out: an export is made only
if reading it back gives the same model.
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
from flax import nnx

from mlm_jax.checkpoint.hf_makes import MAKES, Make
from mlm_jax.checkpoint.hf_settings import Nouns, Settings
from mlm_jax.checkpoint.names import fitting
from mlm_jax.config import ModelConfig
from mlm_jax.door import from_dict
from mlm_jax.errors import CheckpointError, ConfigError
from mlm_jax.layers.weight import weight_names
from mlm_jax.layout import Layout
from mlm_jax.models import declare

# Of these a model's weights and values know nothing, or Hugging Face has its own word for them.
FREE = {"attention", "dropout", "dtype", "init_std"}


def make_of(config: Mapping[str, Any]) -> tuple[str, Make]:
    """The make that a config.json is of. Raises CheckpointError for one that is not known."""
    kind, classes = config.get("model_type"), config.get("architectures") or []
    if (
        not isinstance(kind, str | None)
        or not isinstance(classes, list)
        or not all(isinstance(name, str) for name in classes)
    ):
        raise CheckpointError(
            f"config.json has model_type={kind!r} and architectures={classes!r}: a name is needed,"
            " and a list of names"
        )
    known = {name: kind for kind, make in MAKES.items() for name in make.classes}
    if kind is None and classes and classes[0] in known:
        kind = known[classes[0]]
    if kind not in MAKES:
        if kind is None:
            raise CheckpointError(
                "config.json has no model_type: it is of no model of transformers"
            )
        near = difflib.get_close_matches(str(kind), MAKES, n=1, cutoff=0.5)
        why = "; it has a vision tower: only its text model, gemma3_text, can be built here"
        hint = why * (kind == "gemma3") or (f"; the nearest is {near[0]}" if near else "")
        raise CheckpointError(
            f"model_type {kind!r} is no architecture known here{hint}; known are {', '.join(MAKES)}"
        )
    if classes and not set(classes) & set(MAKES[kind].classes):
        raise CheckpointError(
            f"architectures {classes} of model_type {kind!r} has another head; known are"
            f" {', '.join(MAKES[kind].classes)}"
        )
    return kind, MAKES[kind]


def read_config(config: Mapping[str, Any], tensors: Collection[str] = ()) -> ModelConfig:
    """The model that a config.json and the names of the tensors beside it describe.

    Raises CheckpointError with everything that cannot be built here.
    """
    kind, make = make_of(config)
    s = Settings(config, tensors)
    s.only("quantization_config", None)
    try:
        nouns = make.read(s)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as why:
        s.problems.append(f"something in it is not what it should be: {type(why).__name__}: {why}")
        nouns = {}
    if not s.problems:
        nouns["dtype"] = "bfloat16" if "bfloat16" in str(dtype_of(config)) else "float32"
        nouns["init_std"] = s.given("initializer_range", 0.02)
        try:
            return from_dict({"model": without_none(nouns)}).model
        except ConfigError as why:
            s.problems.append(str(why))
    raise CheckpointError(
        f"this {kind} cannot be built here, by its config.json:\n  " + "\n  ".join(s.problems)
    )


def dtype_of(config: Mapping[str, Any]) -> str | None:
    return config.get("dtype") or config.get("torch_dtype")  # transformers 5, and before


def without_none(nouns: Nouns) -> Nouns:
    return {key: value for key, value in nouns.items() if value is not None}


def write_config(m: ModelConfig, first: str | None = None) -> tuple[str, dict[str, Any]]:
    """(model_type, config.json) of the first make that says all that this model is.

    first: the make to try before the others: where the model came from.
    Raises CheckpointError with what is lost in the nearest make.
    """
    single = Layout.create(jax.devices()[:1])
    weights = weight_names(nnx.state(declare(m, single), nnx.Param))
    losses: dict[str, list[str]] = {}
    for kind in sorted(MAKES, key=lambda kind: kind != first):
        config = {
            "architectures": [MAKES[kind].classes[0]], "model_type": kind,
            "initializer_range": m.init_std, **MAKES[kind].write(m),
        }  # fmt: skip
        losses[kind] = lost(m, kind, config, weights)
        if not losses[kind]:
            return kind, config
    near = [kind for kind in losses if any(line.startswith("model.") for line in losses[kind])]
    nearest = min(near or losses, key=lambda kind: len(losses[kind]))
    raise CheckpointError(
        "no architecture of Hugging Face known here says all that this model is; the nearest,"
        f" {nearest}, differs in:\n  " + "\n  ".join(losses[nearest])
    )


def lost(m: ModelConfig, kind: str, config: dict[str, Any], weights: list[str]) -> list[str]:
    """What reading this config.json again would change in the model."""
    try:
        rows = fitting(MAKES[kind].table, weights)
        back = read_config(config, {name for row in rows for name in row.of_layer(0)})
    except CheckpointError as why:
        return [line.strip() for line in str(why).splitlines()[1:] or [str(why)]]
    here, there = canonical(m), canonical(back)
    return [
        f"model.{key}={here[key]!r}, and there {there.get(key)!r}"
        for key in here
        if not same(here[key], there.get(key))
    ]


def same(one: Any, other: Any) -> bool:
    """Numbers that were computed in two ways are."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return one == other


def canonical(m: ModelConfig) -> dict[str, Any]:
    """The nouns that make a model what it is; of two ways to say the same thing, one."""
    nouns = {key: value for key, value in dataclasses.asdict(m).items() if key not in FREE}
    if m.attention_scale is None:
        nouns["attention_scale"] = 1 / math.sqrt(m.head_dim)
    if m.rotary_local_base is None and m.rope_scaling == "none":
        nouns["rotary_local_base"] = m.rotary_base
    if m.norm == "rmsnorm":
        nouns["norm_bias"] = False
    no_part = {
        # bias: the others say which
        "gpt": {"bias", "mlm_head", "pooler", "order_head", "n_decoder_layers", "target_len"},
        "bert": {"n_decoder_layers", "target_len"},
        "t5": {"bias", "seq_len", "target_len"},  # any length will do
    }  # fmt: skip
    return {key: value for key, value in nouns.items() if key not in no_part[m.family]}
