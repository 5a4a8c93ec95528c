"""A layout: a mesh of devices, and a table from the dims of arrays to the axes of that mesh.

Weights and activations name their dims; only a Layout knows which mesh axes split them. So a new
sharding is another row of the table, and one model runs under all of them.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlm_jax.config import ModelConfig, RunConfig
from mlm_jax.errors import LayoutError
from mlm_jax.layout_misfits import model_misfits, run_misfits
from mlm_jax.layout_rules import (
    bad_rules,
    bad_sizes,
    clashing_rules,
    either,
    idle_settings,
    refuse,
)
from mlm_jax.mesh import MESH_AXES, make_mesh, node_size, resolve, shown_sizes

# Which mesh axes split which dim. tp splits what a block computes inside, fsdp of each weight the
# dim that comes first. Weights that write to the residual stream, and the embedding table, have
# that dim split by tp too: their inner dims have names of their own (*_inner, vocab_in). Splitting
# the last dim instead makes XLA transpose stacked gradients, and all-reduce the table's whole one.
RULES = {
    # dims of activations, and of weights that read the residual stream
    "batch": ("dp", "fsdp", "ep"), "seq": ("cp",), "residual_seq": ("cp",),
    "embed": ("fsdp",), "heads": ("tp",), "kv_heads": ("tp",), "mlp": ("tp",), "vocab": ("tp",),
    # dims of weights that write to it, of its own vectors, and of the tables of embeddings
    "attn_inner": ("tp", "fsdp"), "mlp_inner": ("tp", "fsdp"), "residual": (), "head_dim": (),
    "vocab_in": ("tp", "fsdp"), "vocab_embed": (), "position": ("fsdp",),
    "token_type": (), "order": (), "bucket": (),
    "layer": ("pp",), "expert": ("ep",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and a table.

    mesh     every axis of MESH_AXES, idle ones with size 1; an AbstractMesh can only be explained
    rules    dim -> mesh axes that split it
    weights  (regex of a weight's path, dims): names that replace the model's own
    zero     1: optimizer state is split over dp too, 2: gradients as well (ZeRO: Rajbhandari et al.
             2020); 3 is the axis fsdp
    pipeline     order of the work of pp stages: gpipe, circular or 1f1b (models.pipeline)
    chunks       parts of the model that a pp stage holds, each of layers in a row
    cp_attention     how attention sees the whole sequence under cp: ring or all_gather
    manual   axes that the code at hand splits by itself, inside a shard_map: see `inside`
    """

    mesh: Mesh | AbstractMesh
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: RULES)
    weights: tuple[tuple[str, tuple[str, ...]], ...] = ()
    zero: int = 0
    pipeline: str = "1f1b"
    chunks: int = 1
    cp_attention: str = "ring"
    manual: tuple[str, ...] = ()

    def __repr__(self) -> str:  # a model shows its layout once a module
        return f"Layout({self.sizes})"

    @property
    def sizes(self) -> str:
        return shown_sizes(self.mesh.shape)

    def __hash__(self):
        return hash((self.mesh, tuple(sorted(self.rules.items())), self.weights))

    @classmethod
    def create(
        cls, devices: Sequence[Any] | int | None = None, *, pp=1, dp=1, fsdp=1, ep=1, cp=1,
        tp=1, sequence_parallel=False, rules: Mapping[str, Sequence[str]] | None = None, weights=(),
        zero: int = 0, pipeline: str | None = None, chunks: int | None = None,
        cp_attention: str | None = None,
    ) -> "Layout":  # fmt: skip
        """A layout over `devices` (default: all; a number: only imagined, for `explain`)."""
        devices = jax.devices() if devices is None else devices
        count = devices if isinstance(devices, int) else len(devices)
        sizes = {"pp": pp, "dp": dp, "fsdp": fsdp, "ep": ep, "cp": cp, "tp": tp}
        table = RULES | ({"residual_seq": ("cp", "tp")} if sequence_parallel else {})
        table |= {dim: tuple(axes) for dim, axes in (rules or {}).items()}
        if isinstance(devices, str):
            raise LayoutError(f"devices={devices!r} are none; presets go with layout.preset")
        unknown = bad_rules(table, tuple(weights), known=RULES)
        refuse(
            "this layout cannot be made",
            bad_sizes(sizes, count)
            + idle_settings(sizes, sequence_parallel, zero, pipeline, chunks, cp_attention)
            + (unknown or clashing_rules(table, sizes, RULES)),
        )
        pipeline = pipeline or "1f1b"
        chunks = chunks or (2 if pipeline == "circular" else 1)
        return cls(
            make_mesh(devices, sizes), table, tuple(weights), zero, pipeline, chunks,
            cp_attention or "ring",
        )  # fmt: skip

    @classmethod
    def from_config(
        cls, run: RunConfig, devices: Sequence[Any] | int | None = None, *, training: bool = True
    ) -> "Layout":
        """The layout that run.layout asks for, fitted to the model and, in training, the batch."""
        devices = jax.devices() if devices is None else devices
        count = devices if isinstance(devices, int) else len(devices)
        wanted = resolve(run.layout, count, node_size(run.layout, devices))
        if run.layout.preset == "single" and math.prod(wanted[a] for a in MESH_AXES) == 1:
            devices = 1 if isinstance(devices, int) else devices[:1]
        if not training:
            wanted["zero"] = 0
        layout = cls.create(
            devices,
            **wanted,
            rules=dict(run.layout.rules),
            weights=run.layout.weights,
            pipeline=run.layout.pipeline,
            chunks=run.layout.chunks,
            cp_attention=run.layout.cp_attention,
        )
        if not training:
            return layout.fit(run.model)
        refuse(f"layout {layout.sizes} does not fit this run", run_misfits(layout, run))
        return layout.settled(run.model)

    def spec(self, *dims: str | None) -> P:
        """PartitionSpec of an array with these dims; None is a dim that is never split."""
        return P(*(self.axes(dim) or None for dim in dims))

    def axes(self, dim: str | None) -> tuple[str, ...]:
        """The mesh axes of size above 1 that split this dim of an array at hand."""
        idle = self.manual
        return (
            tuple(a for a in self.rules[dim] if self.mesh.shape[a] > 1 and a not in idle)
            if dim
            else ()
        )

    def sharding(self, *dims: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*dims))

    def constrain(self, x: jax.Array, *dims: str | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, self._on_mesh(self.spec(*dims)))

    def constrain_weights(self, weights: Any) -> Any:
        """Weights laid as they are stored; so are their gradients, when this is differentiated."""
        return jax.lax.with_sharding_constraint(weights, self.shardings(weights))

    def constrain_gradients(self, grads: nnx.State) -> nnx.State:
        """Gradients split as optimizer state is."""
        return jax.lax.with_sharding_constraint(grads, self.shardings(grads, of_optimizer=True))

    def _on_mesh(self, spec: P) -> NamedSharding | P:
        """Inside a shard_map the mesh is the one around us, and a bare spec says all."""
        return spec if self.manual else NamedSharding(self.mesh, spec)

    def ways(self, dim: str) -> int:
        """Into how many parts this dim is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(dim))

    def inside(self, *axes: str) -> "Layout":
        """This layout within a shard_map over these axes, where an array is a device's own part."""
        return dataclasses.replace(self, manual=axes)

    @property
    def context(self) -> int:
        """Into how many parts sequences are split, also where the code at hand does so itself."""
        return self.mesh.shape["cp"] if "cp" in self.rules["seq"] else 1

    def order(self, seq_len: int) -> np.ndarray:
        """[T] places of a sequence in the order in which activations hold them under cp.

        Of 2 cp parts in a row, device i holds the parts i and 2 cp - 1 - i: an early and a late
        one, so that causal attention is as much work on each (zigzag: Llama 3, section 3.3.2).
        """
        n = 2 * self.context
        if n == 2:
            return np.arange(seq_len)
        if seq_len % n:
            near = sorted({seq_len // n * n, -(-seq_len // n) * n} - {0})
            raise LayoutError(
                f"a sequence of {seq_len} tokens does not divide by layout.cp={n // 2} * 2 of"
                f" zigzag; try {either(near)}, or another layout"
            )
        zigzag = [part for i in range(n // 2) for part in (i, n - 1 - i)]
        return np.arange(seq_len).reshape(n, -1)[zigzag].reshape(-1)

    def on_gpu(self) -> bool:
        devices = self.mesh.devices if isinstance(self.mesh, Mesh) else None
        return devices is not None and devices.flat[0].platform in ("gpu", "cuda")

    def has_cudnn(self) -> bool:
        """Whether the devices run cuDNN's attention: NVIDIA's, from compute capability 8.0 on."""
        device = self.mesh.devices.flat[0] if isinstance(self.mesh, Mesh) else None
        found = re.match(r"\d+", str(getattr(device, "compute_capability", "")))
        return self.on_gpu() and found is not None and int(found[0]) >= 8

    def shardings(self, tree: Any, *, of_optimizer: bool = False) -> Any:
        """A prefix of `tree` with NamedShardings. Leaves without dim names are replicated.

        of_optimizer: the tree holds what `zero` splits further: optimizer state, or gradients.

        Raises LayoutError for a weight whose names do not match its rank, are unknown, or put two
        of its dims on one mesh axis.
        """

        def sharding(path: tuple, w: Any) -> NamedSharding | P:
            dims = self._dims(path, w)
            further = of_optimizer and self.zero and "dp" not in self.manual and is_weight(w)
            return self._on_mesh(self._zero_spec(dims, w) if further else self.spec(*dims))

        return jax.tree_util.tree_map_with_path(sharding, tree, is_leaf=is_weight)

    def _zero_spec(self, dims: tuple[str | None, ...], w: Any) -> P:
        """The spec of w with dp on the first dim, `layer` aside, that divides by it too."""
        split = [self.axes(dim) for dim in dims]
        unused = all("dp" not in axes for axes in split)  # a rule by hand may have given it away
        for i, dim in enumerate(dims):
            ways = math.prod(self.mesh.shape[axis] for axis in (*split[i], "dp"))
            if unused and dim not in (None, "layer") and w.shape[i] % ways == 0:
                split[i] = (*split[i], "dp")
                break
        return P(*(axes or None for axes in split))

    def placed(self, shapes: Any, *, of_optimizer: bool = False) -> Any:
        """A tree of ShapeDtypeStructs, each with its sharding: what a restored tree is like."""

        def place(sharding: NamedSharding, part: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
            )

        return jax.tree.map(place, self.shardings(shapes, of_optimizer=of_optimizer), shapes)

    def fit(self, cfg: ModelConfig, batch: int | None = None) -> "Layout":
        """`settled`, where all other dims of the model divide, and a microbatch of that size.

        Raises one LayoutError with everything that does not, and values that would.
        """
        refuse(f"layout {self.sizes} does not fit this run", model_misfits(self, cfg, batch))
        return self.settled(cfg)

    def settled(self, cfg: ModelConfig) -> "Layout":
        """This layout with the rows that depend on a model's sizes.

        kv_heads are replicated where tp is a multiple of them; a table of embeddings whose rows do
        not divide by tp * fsdp has fsdp split its columns, or the positions' none.
        """
        dims = cfg.dims
        by_hand = {dim for dim, axes in RULES.items() if self.rules[dim] != axes}
        rows: dict[str, tuple[str, ...]] = {}
        tp = self.mesh.shape["tp"]
        if dims["kv_heads"] % tp and tp % dims["kv_heads"] == 0 and dims["heads"] % tp == 0:
            rows["kv_heads"] = ()
        if dims["vocab_in"] % self.ways("vocab_in") and not by_hand & {"vocab_in", "vocab_embed"}:
            rows |= {"vocab_in": ("tp",), "vocab_embed": ("fsdp",)}
        if cfg.seq_len % self.ways("position"):
            rows["position"] = ()
        rows = {dim: axes for dim, axes in rows.items() if dim not in by_hand}
        return dataclasses.replace(self, rules=dict(self.rules) | rows)

    def generating(self, cfg: ModelConfig) -> "Layout":
        """This layout for generation, which adds a token a turn: no sequence is split, cp idles.

        Layers run one after the other, so pp splits each of them, as fsdp does, where it can.
        """
        rules = dict(self.rules) | {"seq": (), "residual_seq": ()}
        if self.axes("layer"):
            rules["layer"] = ()
            for dim in ("embed", "attn_inner", "mlp_inner"):
                axes = (*self.rules[dim], "pp")
                if cfg.dims[dim] % math.prod(self.mesh.shape[a] for a in axes) == 0:
                    rules[dim] = axes
        return dataclasses.replace(self, rules=rules)

    def factors(self, dim: str) -> list[tuple[str, int]]:
        """What a size must divide by, named: mesh axes, and the parts that schedules make."""
        factors = [(f"layout.{a}", self.mesh.shape[a]) for a in self.axes(dim)]
        if dim == "layer" and self.chunks > 1:
            factors.append(("layout.chunks", self.chunks))
        if dim == "seq" and self.context > 1:
            factors.append(("2 of zigzag", 2))
        return factors

    def explain(self, params: nnx.State) -> list[dict]:
        """One row a weight: path, shape, dims, the rules that fired, spec, bytes a device holds."""
        rows = []
        for path, w in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight):
            dims = self._dims(path, w)
            fired = [f"{d}={','.join(self.axes(d))}" for d in dims if self.axes(d)]
            held = math.prod(self.sharding(*dims).shard_shape(w.shape)) * w.dtype.itemsize
            rows.append({
                "weight": path_name(path), "shape": tuple(w.shape), "dims": dims,
                "rule": "; ".join(fired) or "replicated", "spec": self.spec(*dims), "bytes": held,
            })  # fmt: skip
        return rows

    def _dims(self, path: tuple, w: Any) -> tuple[str | None, ...]:
        dims = w.get_metadata().get("out_sharding") if isinstance(w, nnx.Variable) else None
        if not dims:
            return (None,) * getattr(w, "ndim", 0)
        problem = None
        at_odds = [d for d, n in zip(dims, w.shape) if d in self.rules and n % self.ways(d)]  # noqa: B905
        if len(dims) != len(w.shape):  # or JAX splits the wrong dim without a word
            problem = f"has shape {tuple(w.shape)}; is it stacked without 'layer'?"
        elif unknown := [d for d in dims if d is not None and d not in self.rules]:
            problem = f"names {unknown}, which no rule has"
        else:
            axes = [axis for d in dims for axis in self.axes(d)]
            if twice := {a for a in axes if axes.count(a) > 1}:
                problem = f"would be split twice by {sorted(twice)}; change layout.rules"
            elif at_odds:
                problem = f"has shape {tuple(w.shape)}: {at_odds} cannot be split that often"
        if problem:
            raise LayoutError(f"weight {path_name(path)} with dims {dims} {problem}")
        return dims


def is_weight(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def path_name(path: tuple) -> str:
    """'blocks.mlp.up' of a key path as jax.tree_util gives it."""
    parts = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path]
    return ".".join(str(p) for p in parts)


def bytes_held(tree: Any) -> int:
    """What one device holds of a tree of arrays, or of shapes that are placed."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
