"""A layout: a mesh of devices, and a table from the dims of arrays to the axes of that mesh.

Weights and activations name their dims; only a Layout knows which mesh axes split them. So a new
sharding is another row of the table, and one model runs under all of them.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlm_jax.batch_sizes import BatchSizes
from mlm_jax.config import LayoutConfig, ModelConfig, RunConfig
from mlm_jax.errors import LayoutError

MESH_AXES: tuple[str, ...] = (
    "pp",
    "dp",
    "fsdp",
    "ep",
    "cp",
    "tp",
)  # slowest network first, fastest last

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
    "layer": ("pp",), "expert": ("ep",),
}  # fmt: skip

PRESETS = {  # an explicit size wins; devices left over go to dp, unless dp is set
    "single": {"dp": 1},
    "dp": {"dp": -1},
    "fsdp": {"fsdp": -1},
    "tp": {"tp": -1},
    "tp_sp": {"tp": -1, "sequence_parallel": True},
    "fsdp_tp": {"fsdp": -1, "tp": 2},
}

SETTINGS = {  # the setting behind a dim, for messages
    "layer": "model.n_layers", "embed": "model.d_model", "heads": "model.n_heads",
    "kv_heads": "model.n_kv_heads", "attn_inner": "model.n_heads * model.head_dim",
    "mlp": "model.d_mlp", "mlp_inner": "model.d_mlp", "seq": "model.seq_len",
    "residual_seq": "model.seq_len", "vocab": "model.vocab_size (padded)",
    "vocab_in": "model.vocab_size (padded)", "position": "model.seq_len",
    "batch": "train.global_batch_size / train.accumulate",
}  # fmt: skip

NOT_YET = {"ep": "expert"}


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
        return f"Layout({_sizes(self.mesh.shape)})"

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
        shape = (pp, dp, fsdp, ep, cp, tp)
        sizes = dict(zip(MESH_AXES, shape, strict=True))
        problems = [
            f"layout.{axis}={sizes[axis]}: {name} parallelism is not built yet; try {axis}=1"
            for axis, name in NOT_YET.items()
            if sizes[axis] > 1
        ]
        wrong = [f"layout.{a}={n!r} must be at least 1" for a, n in sizes.items() if not n >= 1]
        if wrong:
            raise LayoutError("this layout cannot be made:\n  " + "\n  ".join(wrong))
        if (used := math.prod(shape)) != count:
            rest = count // (used // dp) if count % (used // dp) == 0 else None
            fit = f"dp={rest}" if rest else f"sizes whose product is {count}"
            problems.append(f"{_sizes(sizes)} is {used} devices, and there are {count}; try {fit}")
        if sequence_parallel and tp == 1:
            problems.append(
                "layout.sequence_parallel=True does nothing with layout.tp=1; leave it out"
            )
        if zero == 3:
            problems.append(
                "layout.zero=3: weights are split by layout.fsdp; try layout.preset='zero3'"
            )
        elif zero not in (0, 1, 2):
            problems.append(f"layout.zero={zero!r} is no stage of ZeRO; try 0, 1 or 2")
        elif zero and dp == 1:
            problems.append(f"layout.zero={zero} does nothing with layout.dp=1; leave it out")
        problems += _idle_schedules(sizes, pipeline, chunks, cp_attention)
        table = RULES | ({"residual_seq": ("cp", "tp")} if sequence_parallel else {})
        table |= {dim: tuple(axes) for dim, axes in (rules or {}).items()}
        problems += _bad_rules(table, weights)
        if problems:
            raise LayoutError("this layout cannot be made:\n  " + "\n  ".join(problems))
        auto = (AxisType.Auto,) * len(MESH_AXES)  # GSPMD; make_mesh alone would give Explicit axes
        if isinstance(devices, int):
            mesh = AbstractMesh(shape, MESH_AXES, axis_types=auto)
        else:
            mesh = jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices)
        pipeline = pipeline or "1f1b"
        chunks = chunks or (2 if pipeline == "circular" else 1)
        return cls(mesh, table, tuple(weights), zero, pipeline, chunks, cp_attention or "ring")

    @classmethod
    def from_config(
        cls, run: RunConfig, devices: Sequence[Any] | int | None = None, *, training: bool = True
    ) -> "Layout":
        """The layout that run.layout asks for, fitted to the model and, in training, the batch."""
        devices = jax.devices() if devices is None else devices
        count = devices if isinstance(devices, int) else len(devices)
        sizes, sequence_parallel = resolve(run.layout, count)
        if run.layout.preset == "single" and math.prod(sizes.values()) == 1:
            devices = 1 if isinstance(devices, int) else devices[:1]
        layout = cls.create(
            devices, **sizes, sequence_parallel=sequence_parallel,
            rules=dict(run.layout.rules), weights=run.layout.weights,
            zero=run.layout.zero if training else 0, pipeline=run.layout.pipeline,
            chunks=run.layout.chunks, cp_attention=run.layout.cp_attention,
        )  # fmt: skip
        if not training:
            return layout.fit(run.model)
        fitted = layout.fit(run.model, batch=run.train.microbatch)
        layout.check_microbatches(run)
        small = [n for n in BatchSizes.of(run).sizes() if n < run.train.microbatch]
        if wrong := [n for n in small if n % layout.ways("batch")]:
            raise LayoutError(
                f"train.batch_schedule has batches of {_either(wrong)} sequences, which do not"
                f" divide by {' * '.join(f'layout.{a}' for a in layout.axes('batch'))} ="
                f" {layout.ways('batch')}; give it sizes that do"
            )
        return fitted

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

    def order(self, seq_len: int) -> np.ndarray:
        """[T] places of a sequence in the order in which activations hold them under cp.

        Of 2 cp parts in a row, device i holds the parts i and 2 cp - 1 - i: an early and a late
        one, so that causal attention is as much work on each (zigzag: Llama 3, section 3.3.2).
        """
        n = 2 * self.mesh.shape["cp"]
        parts = np.arange(seq_len).reshape(n, -1) if n > 2 else np.arange(seq_len)[None]
        zigzag = [part for i in range(n // 2) for part in (i, n - 1 - i)] if n > 2 else [0]
        return parts[zigzag].reshape(-1)

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
        is_weight = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731

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
        """This layout with the rows that depend on a model's sizes settled, and the rest checked.

        kv_heads are replicated where tp is a multiple of them; a table of embeddings whose rows do
        not divide by tp * fsdp has fsdp split its columns, or the positions' none.
        """
        rows, dims = {}, cfg.dims | ({} if batch is None else {"batch": batch})
        tp, fsdp = self.mesh.shape["tp"], self.mesh.shape["fsdp"]
        if dims["kv_heads"] % tp and tp % dims["kv_heads"] == 0 and dims["heads"] % tp == 0:
            rows["kv_heads"] = ()
        if dims["vocab_in"] % (tp * fsdp):
            rows |= {"vocab_in": ("tp",), "vocab_embed": ("fsdp",)}
        if cfg.seq_len % fsdp:
            rows["position"] = ()
        own = {dim for dim in rows if self.rules[dim] != RULES[dim]}  # a row set by hand stays
        fitted = dataclasses.replace(
            self, rules=dict(self.rules) | {d: axes for d, axes in rows.items() if d not in own}
        )
        if dims["kv_heads"] == dims["heads"]:
            del dims["kv_heads"]  # one complaint for both is enough
        fitted.check(**dims)
        return fitted

    def check_microbatches(self, run: RunConfig) -> None:
        """Raises LayoutError unless every batch has microbatches enough to fill the pipeline."""
        pp, accumulate = self.mesh.shape["pp"], run.train.accumulate
        for size in BatchSizes.of(run).sizes():
            n = run.train.microbatches(size)
            fits = n % pp == 0 if self.chunks > 1 else n >= pp
            if not fits:
                near = [k for k in range(pp, size + 1) if size % k == 0]
                near = [k for k in near if self.chunks == 1 or k % pp == 0]
                want = f"a multiple of layout.pp={pp}" if self.chunks > 1 else f"layout.pp={pp}"
                raise LayoutError(
                    f"train.accumulate={accumulate} makes {n} microbatches of {size} sequences,"
                    f" and a pipeline needs {want}{'' if self.chunks > 1 else ' at least'};"
                    f" try accumulate {_either(near[:3]) if near else 'with a larger batch'}"
                )

    def whole_sequence(self) -> "Layout":
        """This layout without sequence parallelism: generation adds one token a turn."""
        return dataclasses.replace(
            self, rules=dict(self.rules) | {"residual_seq": self.rules["seq"]}
        )

    def check(self, **sizes: int) -> None:
        """Raise one LayoutError with every dim that does not divide, and sizes that would."""
        misfits = {}
        for dim, size in sizes.items():
            axes, factors = self.axes(dim), self._factors(dim)
            ways = math.prod(n for _, n in factors)
            if size % ways == 0:
                continue
            name = SETTINGS.get(dim, dim)
            unit = math.lcm(ways, 128) if dim.startswith("vocab") else ways
            near = sorted({size // unit * unit, -(-size // unit) * unit} - {0})
            key = "" if " " in name else name.rpartition(".")[2] + " "  # a product is no key
            hint = f"try {key}{_either(near)}"
            if len(axes) == 1:
                divisors = [d for d in range(1, min(size, 2 * ways) + 1) if size % d == 0]
                hint += f", or {axes[0]} {_either(divisors[-3:])}"
            product = " * ".join(name for name, _ in factors)
            misfits[name] = f"{name} = {size} does not divide by {product} = {ways}; {hint}"
        if misfits:
            raise LayoutError(
                f"layout {_sizes(self.mesh.shape)} does not fit this run:\n  "
                + "\n  ".join(misfits.values())
            )

    def _factors(self, dim: str) -> list[tuple[str, int]]:
        """What a size must divide by, named: mesh axes, and the parts that schedules make."""
        axes = self.axes(dim)
        more = {"pp": ("layout.chunks", self.chunks), "cp": ("2 of zigzag", 2)}
        factors = [(f"layout.{a}", self.mesh.shape[a]) for a in axes]
        return factors + [more[a] for a in axes if a in more and more[a][1] > 1]

    def explain(self, params: nnx.State) -> list[dict]:
        """One row a weight: path, shape, dims, the rules that fired, spec, bytes a device holds."""
        rows = []
        for path, w in jax.tree_util.tree_leaves_with_path(
            params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        ):
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


def _idle_schedules(
    sizes: Mapping[str, int], pipeline: str | None, chunks: int | None, cp_attention: str | None
) -> list[str]:
    """Settings of schedules that would do nothing, or contradict each other."""
    checks = [
        (sizes["pp"] == 1 and pipeline is not None,
         f"layout.pipeline={pipeline!r} does nothing with layout.pp=1; leave it out"),
        (sizes["pp"] == 1 and chunks is not None,
         f"layout.chunks={chunks} does nothing with layout.pp=1; leave it out"),
        (sizes["pp"] > 1 and pipeline == "gpipe" and (chunks or 1) > 1,
         f"layout.pipeline='gpipe' has one chunk a stage, not layout.chunks={chunks}; try"
         " circular"),
        (sizes["pp"] > 1 and pipeline == "circular" and chunks == 1,
         "layout.pipeline='circular' with layout.chunks=1 is gpipe; try chunks 2"),
        (sizes["cp"] == 1 and cp_attention is not None,
         f"layout.cp_attention={cp_attention!r} does nothing with layout.cp=1; leave it out"),
    ]  # fmt: skip
    return [message for wrong, message in checks if wrong]


def resolve(cfg: LayoutConfig, count: int) -> tuple[dict[str, int], bool]:
    """Sizes of all axes on `count` devices, and whether sequence parallelism is on."""
    preset = PRESETS[cfg.preset or ("single" if count == 1 else "dp")]
    given = {a: n for a in MESH_AXES if (n := getattr(cfg, a)) is not None}
    sizes = (
        dict.fromkeys(MESH_AXES, 1) | {a: n for a, n in preset.items() if a in MESH_AXES} | given
    )
    rest = [a for a in MESH_AXES if given.get(a) == -1]
    if len(rest) > 1:
        raise LayoutError(
            f"{' and '.join(f'layout.{a}=-1' for a in rest)}: at most one takes the rest"
        )
    if rest:  # given by hand: the preset's own -1 gives way
        sizes = {a: 1 if n == -1 and a not in rest else n for a, n in sizes.items()}
    elif "dp" not in given and cfg.preset != "single" and -1 not in sizes.values():
        rest, sizes["dp"] = ["dp"], -1
    rest = [a for a, n in sizes.items() if n == -1]
    if rest:
        others = math.prod(n for n in sizes.values() if n != -1)
        if count % others:
            shown = _sizes({a: n for a, n in sizes.items() if n != -1})
            raise LayoutError(
                f"layout {shown} takes {others} devices at a time, which does not divide the"
                f" {count} there are; try sizes whose product divides {count}"
            )
        sizes[rest[0]] = count // others
    if cfg.sequence_parallel is not None:
        return sizes, cfg.sequence_parallel
    return sizes, bool(preset.get("sequence_parallel")) and sizes["tp"] > 1


def path_name(path: tuple) -> str:
    """'blocks.mlp.up' of a key path as jax.tree_util gives it."""
    parts = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path]
    return ".".join(str(p) for p in parts)


def _bad_rules(table: Mapping[str, tuple[str, ...]], weights: Sequence) -> list[str]:
    known = {*RULES, *(dim for _, dims in weights for dim in dims)}
    problems = []
    for dim, axes in table.items():
        if dim not in known:
            near = difflib.get_close_matches(dim, known, n=1) or sorted(RULES)
            problems.append(f"layout.rules: no array has a dim {dim!r}; try {_either(near)}")
        problems += [
            f"layout.rules: {dim}={a!r} is no mesh axis; try {_either(MESH_AXES)}"
            for a in axes
            if a not in MESH_AXES
        ]
    for regex, _ in weights:
        try:
            re.compile(regex)
        except re.error as why:
            problems.append(f"layout.weights: {regex!r} is no regular expression: {why}")
    problems += [
        f"layout.weights: {regex}={dim!r} has no rule; try {_either(table)}"
        for regex, dims in weights
        for dim in dims
        if dim not in table
    ]
    return problems


def _sizes(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "of size 1"


def _either(values) -> str:
    *most, last = [str(v) for v in values]
    return f"{', '.join(most)} or {last}" if most else last
