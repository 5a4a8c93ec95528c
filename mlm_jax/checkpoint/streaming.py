"""Weights from elsewhere, tensor after tensor, straight to where a layout wants them.

A process holds one tensor of the source at a time, beside the shards of its own devices: of a
stacked weight each device has its shard from the beginning, and layers are written into it.
"""

import functools
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm_jax.checkpoint.forms import shapes_of_theirs
from mlm_jax.checkpoint.names import Row, fitting
from mlm_jax.config import ModelConfig
from mlm_jax.errors import CheckpointError
from mlm_jax.layers.weight import weight_names
from mlm_jax.layout import Layout

Shape = tuple[int, ...]


class Source(Protocol):
    """Tensors by name: shapes are known, values are read when asked for."""

    @property
    def names(self) -> Collection[str]: ...
    def shape(self, name: str) -> Shape: ...
    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in whatever float dtype it is stored."""
        ...


def read_params(
    declared: nnx.State, table: Sequence[Row], source: Source, cfg: ModelConfig, layout: Layout
) -> nnx.State:
    """The weights of a declared model from a source, placed by the layout.

    Raises CheckpointError with every tensor that is missing, is not known, or has another shape,
    before anything is read.
    """
    placed = layout.placed(declared)
    names, (leaves, tree) = weight_names(declared), jax.tree.flatten(placed)
    kinds = dict(zip(names, leaves, strict=True))
    rows = fitting(table, names)
    check_source(rows, source, {name: kind.shape for name, kind in kinds.items()}, cfg)
    found: dict[str, jax.Array] = {}
    for row in rows:
        read = _layers if row.layered else _whole
        found |= read(row, {name: kinds[name] for name in row.ours}, source, cfg)
    return jax.tree.unflatten(tree, [found[name] for name in names])


def check_source(
    rows: Sequence[Row], source: Source, shapes: dict[str, Shape], cfg: ModelConfig
) -> None:
    """Raises CheckpointError where the source has not just the tensors that these rows name."""
    wanted: dict[str, Shape] = {}
    for row in rows:
        ours = [shapes[name] for name in row.ours]
        layers = range(ours[0][0]) if row.layered else range(1)
        theirs = shapes_of_theirs(row.form, [s[1:] if row.layered else s for s in ours], cfg)
        for layer in layers:
            wanted |= zip(row.of_layer(layer), theirs, strict=True)
    there = set(source.names)
    missing, more = sorted(wanted.keys() - there), sorted(there - wanted.keys())
    problems = [f"it lacks {some(missing)}"] if missing else []
    problems += [f"it has {some(more)}, which this model has no use for"] if more else []
    for name in sorted(wanted.keys() & there):
        if (shape := tuple(source.shape(name))) != wanted[name]:
            problems.append(f"{name} has the shape {list(shape)}, not {list(wanted[name])}")
    if problems:
        rest = len(problems) - 8
        told = problems[:8] + ([f"and {rest} more"] if rest > 0 else [])
        raise CheckpointError(f"{source} does not hold this model:\n  " + "\n  ".join(told))


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _whole(row: Row, kinds: dict[str, Any], source: Source, cfg: ModelConfig) -> dict[str, Any]:
    values = row.form.to_ours([source.read(name) for name in row.theirs], cfg)
    placed = {}
    for (name, kind), value in zip(kinds.items(), values, strict=True):
        part: Any = partial(_part, value, kind.dtype)
        placed[name] = jax.make_array_from_callback(kind.shape, kind.sharding, part)
    return placed


def _part(value: np.ndarray, dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    return np.ascontiguousarray(value[index], dtype)


def _layers(row: Row, kinds: dict[str, Any], source: Source, cfg: ModelConfig) -> dict[str, Any]:
    """Stacked weights. Each stage of a pipeline gets its own layer in the same turn."""
    stacks = {name: zeros(kind) for name, kind in kinds.items()}
    turns = next(iter(kinds.values())).sharding.shard_shape(next(iter(kinds.values())).shape)[0]
    for turn in range(turns):
        pieces: dict[str, list[jax.Array]] = {name: [] for name in kinds}
        for layer, places in by_layer(kinds, turn).items():
            values = row.form.to_ours([source.read(name) for name in row.of_layer(layer)], cfg)
            for name, value in zip(kinds, values, strict=True):
                parts: dict[str, np.ndarray] = {}
                for device, index in places[name]:
                    if (key := str(index)) not in parts:
                        parts[key] = np.ascontiguousarray(value[index])[None]
                    pieces[name].append(jax.device_put(parts[key], device))
        for name, kind in kinds.items():
            shape = (kind.shape[0] // turns, *kind.shape[1:])
            piece = jax.make_array_from_single_device_arrays(shape, kind.sharding, pieces[name])
            stacks[name] = write_layer(kind.sharding)(stacks[name], piece, turn)
        jax.block_until_ready(stacks)  # or what was read is held until it is written
    return stacks


def by_layer(kinds: dict[str, Any], turn: int) -> dict[int, dict[str, list[Any]]]:
    """What devices of this process take in a turn: layer -> weight -> (device, part of it)."""
    found: dict[int, dict[str, list[Any]]] = {}
    for name, kind in kinds.items():
        here = kind.sharding.addressable_devices_indices_map(kind.shape)
        for device, (layers, *index) in here.items():
            places = found.setdefault((layers.start or 0) + turn, {n: [] for n in kinds})
            places[name].append((device, tuple(index)))
    return found


def zeros(kind: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(partial(jnp.zeros, kind.shape, kind.dtype), out_shardings=kind.sharding)()


@functools.cache  # so that a shape is compiled once
def write_layer(sharding: NamedSharding) -> Any:
    """write(stack, piece, i): layer i of each device's part of a stack, which is donated."""

    def write(stack: jax.Array, piece: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(stack, piece.astype(stack.dtype), i, 0)

    spec = sharding.spec
    inside = jax.shard_map(
        write, mesh=sharding.mesh, in_specs=(spec, spec, P()), out_specs=spec, check_vma=False
    )
    return jax.jit(inside, donate_argnums=0)


def read_layer(weight: jax.Array, layer: int | None) -> np.ndarray:
    """One layer of a stacked weight (None: a whole one), on the host; all processes take part."""
    sharding = weight.sharding
    assert isinstance(sharding, NamedSharding)
    whole = _whole_on_each(sharding)(weight) if layer is None else None
    whole = layer_on_each(sharding)(weight, layer) if whole is None else whole
    return np.asarray(whole.addressable_data(0))


@functools.cache
def _whole_on_each(sharding: NamedSharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, P()))


@functools.cache
def layer_on_each(sharding: NamedSharding) -> Any:
    """layer(stack, i) on every device; of a pipeline's stages the one that has it sends it."""
    stages, *within = (*sharding.spec, None)

    def layer(stack: jax.Array, i: jax.Array) -> jax.Array:
        if not stages:
            return jax.lax.dynamic_index_in_dim(stack, i, 0, keepdims=False)
        n = stack.shape[0]
        i -= jax.lax.axis_index(stages) * n
        found = jax.lax.dynamic_index_in_dim(stack, jnp.clip(i, 0, n - 1), 0, keepdims=False)
        bits = found.view(f"uint{8 * found.dtype.itemsize}")  # a sum would lose the sign of -0.0
        bits = jax.lax.psum(jnp.where((i >= 0) & (i < n), bits, 0), stages)
        return bits.view(found.dtype)

    inside = jax.shard_map(
        layer, mesh=sharding.mesh, in_specs=(sharding.spec, P()), out_specs=P(*within[:-1]),
        check_vma=False,
    )  # fmt: skip
    return jax.jit(inside, out_shardings=NamedSharding(sharding.mesh, P()))
