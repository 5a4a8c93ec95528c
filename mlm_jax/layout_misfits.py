"""What a layout does not fit, each with values that would work: they are tried first.

A size has to divide by the mesh axes that split it. Where it does not, other values of the setting
behind it, and other sizes of these axes, are taken in turn as if they had been set; those that
leave no misfit of this kind, and bring none of another, are what a message names.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from jax.sharding import AbstractMesh

from mlm_jax.batch_sizes import BatchSizes
from mlm_jax.config import ModelConfig, RunConfig, TrainConfig
from mlm_jax.layout_rules import either
from mlm_jax.misfits import misfits

if TYPE_CHECKING:
    from mlm_jax.layout import Layout

SETTINGS = {  # what a dim is, for messages; and the setting that changes it
    "layer": ("model.n_layers", "n_layers"), "embed": ("model.d_model", "d_model"),
    "heads": ("model.n_heads", "n_heads"), "kv_heads": ("model.n_kv_heads", "n_kv_heads"),
    "attn_inner": ("model.n_heads * model.head_dim", "head_dim"),
    "mlp": ("model.d_mlp", "d_mlp"), "mlp_inner": ("model.d_mlp", "d_mlp"),
    "seq": ("model.seq_len", "seq_len"), "residual_seq": ("model.seq_len", "seq_len"),
    "vocab": ("model.vocab_size (padded)", "vocab_size"),
    "vocab_in": ("model.vocab_size (padded)", "vocab_size"),
    "batch": ("train.global_batch_size / train.accumulate", None),
}  # fmt: skip
STEPS = 64  # multiples tried on either side


class Case(NamedTuple):
    """A layout and the run it is for, or of it only the model, or the model and a microbatch."""

    layout: "Layout"
    run: RunConfig
    batch: bool = True  # whether the run says what a microbatch is
    whole: bool = True  # whether it says how many there are

    @property
    def sizes(self) -> dict[str, int]:
        """Of all dims that a layout has to divide."""
        dims = self.run.model.dims | ({"batch": self.run.train.microbatch} if self.batch else {})
        if dims["kv_heads"] == dims["heads"]:
            del dims["kv_heads"]  # one complaint for both is enough
        return dims

    def unfit(self) -> dict[str, str]:
        """Name of what does not divide -> its dim; FILLS for microbatches that are too few."""
        settled = self.layout.settled(self.run.model)
        found = {
            SETTINGS[dim][0]: dim
            for dim, size in self.sizes.items()
            if size % math.prod(n for _, n in settled.factors(dim))
        }
        few = self.whole and too_few(self.layout, self.run)
        return found | ({FILLS: ""} if few else {})

    def mended_by(self, other: "Case", name: str) -> bool:
        """Whether that is no misfit of another case any more, nor anything new one."""
        return other.unfit().keys() <= self.unfit().keys() - {name}

    def train(self, **changes: int) -> "Case":
        train = dataclasses.replace(self.run.train, **changes)
        return self._replace(run=dataclasses.replace(self.run, train=train))


FILLS = "train.accumulate"


def model_misfits(layout: "Layout", cfg: ModelConfig, batch: int | None = None) -> list[str]:
    """Sizes of a model, and of a microbatch, that do not divide by the axes that split them."""
    run = RunConfig(model=cfg, train=TrainConfig(global_batch_size=batch or 1))
    return case_misfits(Case(layout, run, batch is not None, whole=False))


def run_misfits(layout: "Layout", run: RunConfig) -> list[str]:
    """All that this layout does not divide: of the model, of batches, of their microbatches."""
    found = case_misfits(Case(layout, run))
    ways, axes = layout.ways("batch"), layout.axes("batch")
    small = [n for n in BatchSizes.of(run).sizes() if n < run.train.microbatch]
    if wrong := [n for n in small if n % ways]:
        found.append(
            f"train.batch_schedule has batches of {either(wrong)} sequences, which do not divide by"
            f" {' * '.join(f'layout.{a}' for a in axes)} = {ways}; give it sizes that do"
        )
    return found


def case_misfits(case: Case) -> list[str]:
    return [
        few_microbatches(case) if name == FILLS else indivisible(case, name, dim)
        for name, dim in case.unfit().items()
    ]


def indivisible(case: Case, name: str, dim: str) -> str:
    factors = case.layout.settled(case.run.model).factors(dim)
    ways = math.prod(n for _, n in factors)
    hints = [batch_hint(case, ways) if dim == "batch" else setting_hint(case, dim, ways)]
    hints += [axis_hint(case, name, factor) for factor, _ in factors]
    if not any(hints):  # no change of one setting alone is enough
        key = SETTINGS[dim][1] or "global_batch_size"
        near = near_multiples(case.sizes[dim], ways)
        hints = [f"{key} {either(near)}, with what goes with it"]
    product = " * ".join(factor for factor, _ in factors)
    tries = ", or ".join(filter(None, hints))
    return f"{name} = {case.sizes[dim]} does not divide by {product} = {ways}; try {tries}"


def too_few(layout: "Layout", run: RunConfig) -> list[int]:
    """Batch sizes whose microbatches do not fill the pipeline."""
    pp, micros = layout.mesh.shape["pp"], run.train.microbatches
    fills = lambda n: n % pp == 0 if layout.chunks > 1 else n >= pp  # noqa: E731
    return [size for size in BatchSizes.of(run).sizes() if not fills(micros(size))]


def few_microbatches(case: Case) -> str:
    train, pp, chunks = case.run.train, case.layout.mesh.shape["pp"], case.layout.chunks
    size = too_few(case.layout, case.run)[0]
    if not (hint := accumulate_hint(case, FILLS)):
        n = -(-train.accumulate // pp) * pp
        hint = f"accumulate {n} and global_batch_size {n * case.layout.ways('batch')}"
    want = f"a multiple of layout.pp = {pp}" if chunks > 1 else f"layout.pp = {pp}"
    return (
        f"train.accumulate = {train.accumulate} makes {train.microbatches(size)} microbatches of"
        f" {size} sequences, and a pipeline needs {want}{'' if chunks > 1 else ' at least'}; try"
        f" {hint}"
    )


def setting_hint(case: Case, dim: str, ways: int) -> str:
    """The next values of a setting of the model, below and above, with which its size fits."""
    (name, key), cfg = SETTINGS[dim], case.run.model
    unit = ways // math.gcd(ways, cfg.n_heads) if dim == "attn_inner" else ways
    unit = math.lcm(unit, 128) if key == "vocab_size" else unit
    said = set(misfits(case.run))

    def works(value: int) -> bool:
        run = dataclasses.replace(case.run, model=changed(cfg, key, value))
        return case.mended_by(case._replace(run=run), name) and said >= set(misfits(run))

    start = getattr(cfg, key) // unit
    below = next((k for k in range(start, max(start - STEPS, 0), -1) if works(k * unit)), None)
    above = next((k for k in range(start + 1, start + STEPS) if works(k * unit)), None)
    values = [k * unit for k in (below, above) if k]
    return f"{key} {either(values)}" if values else ""


def changed(cfg: ModelConfig, key: str, value: int) -> ModelConfig:
    """cfg with another value, which those that follow it by default follow."""
    derived = {"n_kv_heads": cfg.n_heads, "head_dim": cfg.d_model // cfg.n_heads,
               "d_mlp": 4 * cfg.d_model}  # fmt: skip
    follow: dict[str, Any] = {k: None for k, v in derived.items() if getattr(cfg, k) == v}
    return dataclasses.replace(cfg, **follow | {key: value})


def batch_hint(case: Case, ways: int) -> str:
    """Of a run, settings that make microbatches that divide; without it, sizes of these."""
    train, name = case.run.train, SETTINGS["batch"][0]
    if not case.whole or train.batch_schedule is not None:
        return either(near_multiples(train.microbatch, ways))
    near = near_multiples(train.global_batch_size, train.accumulate * ways)
    fits = [n for n in near if case.mended_by(case.train(global_batch_size=n), name)]
    hints = [accumulate_hint(case, name), f"global_batch_size {either(fits)}" if fits else ""]
    return ", or ".join(filter(None, hints))


def accumulate_hint(case: Case, name: str) -> str:
    train = case.run.train
    if train.batch_schedule is not None:
        return ""
    batch, n = train.global_batch_size, train.accumulate
    near = sorted((k for k in range(1, batch + 1) if batch % k == 0), key=lambda k: abs(k - n))
    fits = [k for k in near if case.mended_by(case.train(accumulate=k), name)]
    return f"accumulate {either(fits[:3])}" if fits else ""


def axis_hint(case: Case, name: str, factor: str) -> str:
    """Other sizes of an axis, the nearest first, with which what it splits fits; dp the rest."""
    key = factor.rpartition(".")[2]
    shown = [
        text
        for text, layout in others(case.layout, key)
        if case.mended_by(case._replace(layout=layout), name)
    ]
    return f"{key} {either(shown[:3])}" if shown else ""


def others(layout: "Layout", key: str) -> Iterator[tuple[str, "Layout"]]:
    """Layouts over as many devices with another size of an axis, or another number of chunks.

    Not with an axis of size 1: settings that go with it would do nothing, and be refused.
    """
    if key == "chunks":
        least = 2 if layout.pipeline == "circular" else 1
        for n in filter(lambda n: n >= least, nearest(layout.chunks)):
            yield str(n), dataclasses.replace(layout, chunks=n)
    sizes, total = dict(layout.mesh.shape), layout.mesh.size
    if key not in sizes or key == "dp":
        return
    for n in filter(lambda n: n > 1, nearest(sizes[key])):
        rest = math.prod(sizes[a] for a in sizes if a not in ("dp", key)) * n
        if total % rest == 0:
            new = sizes | {key: n, "dp": total // rest}
            mesh = AbstractMesh(tuple(new.values()), tuple(new))
            with_dp = f" (dp {new['dp']})" if new["dp"] != sizes["dp"] else ""
            yield f"{n}{with_dp}", dataclasses.replace(layout, mesh=mesh)


def nearest(n: int) -> list[int]:
    return sorted((k for k in range(1, 2 * n + 1) if k != n), key=lambda k: abs(k - n))


def near_multiples(n: int, unit: int) -> list[int]:
    return sorted({n // unit * unit, -(-n // unit) * unit} - {0})
