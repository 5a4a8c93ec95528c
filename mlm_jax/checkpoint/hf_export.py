"""Models of ours, written as Hugging Face's."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlm_jax.checkpoint.aside import built_aside, require_new
from mlm_jax.checkpoint.forms import shapes_of_theirs
from mlm_jax.checkpoint.hf_config import write_config
from mlm_jax.checkpoint.hf_files import INDEX, SINGLE
from mlm_jax.checkpoint.hf_makes import MAKES
from mlm_jax.checkpoint.names import Row, fitting
from mlm_jax.checkpoint.streaming import Shape, read_layer
from mlm_jax.config import ModelConfig
from mlm_jax.distributed import lead, lead_says
from mlm_jax.errors import ConfigError
from mlm_jax.layers.weight import weight_names

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
MAX_SHARD = 5 * 10**9  # bytes


class Part(NamedTuple):
    """The tensors of a row, of one layer of it."""

    row: Row
    layer: int
    shapes: dict[str, Shape]  # by their names


def to_hf(
    model: Any, folder: Path | str, dtype: str | None = None, max_shard_size: int = MAX_SHARD
) -> None:
    """Writes the model to a new folder, as transformers reads it: weights, settings, tokenizer.

    dtype            of the tensors; None: model.dtype if that holds every weight as it is, else
                     that of the weights. Another one rounds.
    max_shard_size   bytes of a file at most; the tensors of one layer's row are never parted

    Of a model split over devices one tensor of one layer at a time is gathered. Over several
    processes all call this, and the lead writes.

    Raises CheckpointError where no architecture of Hugging Face says all that the model is, the
    folder is not new, or the disk too small; then, as where writing fails, nothing is left behind.
    """
    folder, origin = Path(folder), getattr(model, "origin", None) or {}
    kind, config = write_config(model.cfg, origin.get("model_type"))
    params = nnx.state(model, nnx.Param)
    weights = dict(zip(weight_names(params), jax.tree.leaves(params), strict=True))
    dtype = dtype or exact_dtype(model.cfg, weights)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is none that can be written; try {', '.join(DTYPES)}")
    parts = list(parts_of(fitting(MAKES[kind].table, weights), weights, model.cfg))
    files = filed(parts, jnp.dtype(dtype).itemsize, max_shard_size)
    total = sum(size_of(part, jnp.dtype(dtype).itemsize) for part in parts)
    lead_says(lambda: require_new(folder, total))
    if not lead():
        for part in parts:
            theirs(part, weights, model.cfg)
        return
    with built_aside(folder) as aside:
        for name, held in files.items():
            write_tensors(aside / name, held, weights, model.cfg, dtype)
        if len(files) > 1:
            where = {
                tensor: name for name, held in files.items() for p in held for tensor in p.shapes
            }
            write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        about = {"dtype": dtype, "torch_dtype": dtype, **ids(model, origin)}
        write_json(aside / "config.json", config | about)
        if origin.get("generation"):
            write_json(aside / "generation_config.json", origin["generation"])
        if tokenizer := getattr(model, "tokenizer", None):
            tokenizer.save(aside)


def exact_dtype(cfg: ModelConfig, weights: dict[str, jax.Array]) -> str:
    """model.dtype if no weight changes in it, else the weights' own."""
    wanted = jnp.dtype(cfg.dtype)

    @jax.jit
    def unchanged(x: jax.Array) -> jax.Array:
        return (x.astype(wanted).astype(x.dtype) == x).all()

    same = all(w.dtype == wanted or unchanged(w) for w in weights.values())
    return cfg.dtype if same else str(cfg.wide_dtype)


def parts_of(rows: list[Row], weights: dict[str, jax.Array], cfg: ModelConfig) -> Iterator[Part]:
    for row in rows:
        ours = [weights[name].shape for name in row.ours]
        shapes = shapes_of_theirs(row.form, [s[1:] if row.layered else s for s in ours], cfg)
        for layer in range(ours[0][0] if row.layered else 1):
            yield Part(row, layer, dict(zip(row.of_layer(layer), shapes, strict=True)))


def size_of(part: Part, itemsize: int) -> int:
    return sum(itemsize * math.prod(shape) for shape in part.shapes.values())


def filed(parts: list[Part], itemsize: int, most: int) -> dict[str, list[Part]]:
    """Which file holds which tensors: one, or as many as needed."""
    files: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if files[-1] and size + size_of(part, itemsize) > most:
            files.append([])
            size = 0
        files[-1].append(part)
        size += size_of(part, itemsize)
    if len(files) == 1:
        return {SINGLE: files[0]}
    stem = SINGLE.removesuffix(".safetensors")
    name = f"{stem}-{{:05}}-of-{len(files):05}.safetensors"
    return {name.format(i): held for i, held in enumerate(files, 1)}


def write_tensors(
    path: Path, parts: list[Part], weights: dict[str, jax.Array], cfg: ModelConfig, dtype: str
) -> None:
    """One file: 8 bytes that say how long the header is, a header in JSON, the tensors in a row.

    The package safetensors would want all of them at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        for name, shape in part.shapes.items():
            start, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            for value in theirs(part, weights, cfg):
                file.write(np.ascontiguousarray(value, jnp.dtype(dtype)).tobytes())


def theirs(part: Part, weights: dict[str, jax.Array], cfg: ModelConfig) -> list[np.ndarray]:
    layer = part.layer if part.row.layered else None
    return part.row.form.to_theirs([read_layer(weights[n], layer) for n in part.row.ours], cfg)


def ids(model: Any, origin: dict[str, Any]) -> dict[str, int | None]:
    """Ids of special tokens: as they came along, else the tokenizer's, else none."""
    found = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer := getattr(model, "tokenizer", None):
        found |= {key: tokenizer.special.get(key.partition("_")[0]) for key in found}
    return found | origin.get("ids", {})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
