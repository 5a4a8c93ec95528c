"""What a layout does not fit, each with values that would work: they are tried first.

A size has to divide by the mesh axes that split it, and a batch has to fill a pipeline. Where one
does not, other values of the settings behind it are taken in turn, the nearest first, as if they
had been set. Those that take away this misfit, and bring no other refusal, a message names.
"""

import dataclasses
import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from jax.sharding import AbstractMesh

from mlm_jax.batch_sizes import BatchSizes
from mlm_jax.config import ModelConfig, RunConfig, TrainConfig
from mlm_jax.layout_rules import clashing_rules, either, idle_settings
from mlm_jax.misfits import misfits

if TYPE_CHECKING:
    from mlm_jax.layout import Layout

SETTINGS = {  # what a dim is, for messages; and the setting of the model that changes it
    "layer": ("model.n_layers", "n_layers"), "embed": ("model.d_model", "d_model"),
    "heads": ("model.n_heads", "n_heads"), "kv_heads": ("model.n_kv_heads", "n_kv_heads"),
    "attn_inner": ("model.n_heads * model.head_dim", "head_dim"),
    "mlp": ("model.d_mlp", "d_mlp"), "mlp_inner": ("model.d_mlp", "d_mlp"),
    "seq": ("model.seq_len", "seq_len"), "residual_seq": ("model.seq_len", "seq_len"),
    "vocab": ("model.vocab_size (padded)", "vocab_size"),
    "vocab_in": ("model.vocab_size (padded)", "vocab_size"),
    "batch": ("train.global_batch_size / train.accumulate", None),
    # no dims of arrays: microbatches of a batch, and batches of a schedule
    "micros": ("train.accumulate", None), "batches": ("train.batch_schedule", None),
}  # fmt: skip
OF_BATCHES = ("micros", "batches")
STEPS = 64  # values of a setting tried on either side
SHOWN = 2  # values of a setting that a message names


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

    def settled(self) -> "Case":
        return self._replace(layout=self.layout.settled(self.run.model))

    def factors(self, dim: str) -> list[tuple[str, int]]:
        if dim not in OF_BATCHES:
            return self.layout.factors(dim)
        return self.layout.factors("layer" if self.layout.mesh.shape["pp"] > 1 else "batch")

    def wrong_batches(self) -> list[int]:
        """Sizes of batches that do not fill a pipeline; without one, small ones it cannot split."""
        train, pp, chunks = self.run.train, self.layout.mesh.shape["pp"], self.layout.chunks

        def wrong(size: int) -> bool:
            n = train.microbatches(size)
            if pp > 1:
                return n % pp > 0 if chunks > 1 else n < pp
            return size < train.microbatch and size % self.layout.ways("batch") > 0

        return [size for size in BatchSizes.of(self.run).sizes() if wrong(size)]

    def unfit(self) -> dict[str, str]:
        """Name of what does not fit -> its dim."""
        factors = self.settled().factors
        dims = [d for d, n in self.sizes.items() if n % math.prod(k for _, k in factors(d))]
        if self.whole and self.wrong_batches():
            dims.append("batches" if self.run.train.batch_schedule else "micros")
        return {SETTINGS[dim][0]: dim for dim in dims}

    def refused(self) -> set[str]:
        """What else would keep this case from being run."""
        layout, sizes = self.layout, self.layout.mesh.shape
        clashes = clashing_rules(layout.rules, sizes, layout.rules)
        idle = idle_settings(sizes, False, layout.zero, None, None, None)
        return {*misfits(self.run), *clashes, *idle}

    def with_train(self, **changes: int) -> "Case":
        train = dataclasses.replace(self.run.train, **changes)
        return self._replace(run=dataclasses.replace(self.run, train=train))

    def with_model(self, key: str, value: int) -> "Case":
        """With another value, which those that follow it by default follow."""
        cfg = self.run.model
        derived = {"n_kv_heads": cfg.n_heads, "head_dim": cfg.d_model // cfg.n_heads,
                   "d_mlp": 4 * cfg.d_model, "n_decoder_layers": cfg.n_layers,
                   "target_len": cfg.seq_len}  # fmt: skip
        follow: dict[str, Any] = {k: None for k, v in derived.items() if getattr(cfg, k) == v}
        model = dataclasses.replace(cfg, **follow | {key: value})
        return self._replace(run=dataclasses.replace(self.run, model=model))


def model_misfits(layout: "Layout", cfg: ModelConfig, batch: int | None = None) -> list[str]:
    """Sizes of a model, and of a microbatch, that do not divide by the axes that split them."""
    run = RunConfig(model=cfg, train=TrainConfig(global_batch_size=batch or 1))
    return case_misfits(Case(layout, run, batch is not None, whole=False))


def run_misfits(layout: "Layout", run: RunConfig) -> list[str]:
    """All that this layout does not divide: of the model, of batches, of their microbatches."""
    return case_misfits(Case(layout, run))


def case_misfits(case: Case) -> list[str]:
    return [
        f"{name} = {complaint(case, dim)}; try {', or '.join(hints(case, name, dim))}"
        for name, dim in case.unfit().items()
    ]


def complaint(case: Case, dim: str) -> str:
    train, pp, factors = case.run.train, case.layout.mesh.shape["pp"], case.settled().factors(dim)
    product = " * ".join(name for name, _ in factors)
    indivisible = f"not divide by {product} = {math.prod(n for _, n in factors)}"
    if dim not in OF_BATCHES:
        return f"{case.sizes[dim]} does {indivisible}"
    need, least = ("a multiple of ", "") if case.layout.chunks > 1 else ("", " at least")
    need = f"a pipeline needs {need}layout.pp = {pp}"
    if dim == "micros":
        return f"{train.accumulate} does not fill the stages: {need}{least}"
    batches = f"{train.batch_schedule!r} has batches of {either(case.wrong_batches())} sequences"
    if pp == 1:
        return f"{batches}, which do {indivisible}"
    return (
        f"{batches}, and {need} microbatches of {train.microbatch} = {pp * train.microbatch}{least}"
    )


def hints(case: Case, name: str, dim: str) -> list[str]:
    """Settings with values of which each, without any other change, mends this."""
    others, refused = case.unfit().keys() - {name}, case.refused()
    found = []
    for key, values in changes(case, dim):
        works = (
            v for v, new in values if new.unfit().keys() <= others and new.refused() <= refused
        )
        if shown := list(islice(works, SHOWN)):
            found.append(f"{key} {either(shown)}".strip())
    # Where the last of a schedule is wrong, or a microbatch is, others alone do not help.
    if dim == "batches" and case.run.train.global_batch_size not in case.wrong_batches():
        found += [] if "batch" in case.unfit().values() else ["such batches"]
    key, values = next(changes(case, dim))
    return found or [f"{key} {next(values)[0]}, with what goes with it"]


def changes(case: Case, dim: str) -> Iterator[tuple[str, Iterator[tuple[Any, Case]]]]:
    """Settings that may mend this: other values of each, nearest first, and what they make."""
    train, cfg, factors = case.run.train, case.run.model, case.settled().factors(dim)
    ways, key = math.prod(n for _, n in factors), SETTINGS[dim][1]
    if key:
        unit = ways // math.gcd(ways, cfg.n_heads) if key == "head_dim" else ways
        unit = math.lcm(unit, 128) if key == "vocab_size" else unit
        yield key, ((n, case.with_model(key, n)) for n in nearest(getattr(cfg, key), unit))
    elif case.whole:
        yield "accumulate", accumulations(case, dim)
    if dim == "batch" and train.batch_schedule is None:
        sizes = nearest(train.global_batch_size, train.accumulate * ways)
        resized = ((n, case.with_train(global_batch_size=n)) for n in sizes)
        yield "global_batch_size" if case.whole else "", resized
    for factor, _ in factors:
        axis = factor.rpartition(".")[2]
        yield axis, ((n, case._replace(layout=new)) for n, new in layouts(case.layout, axis))


def accumulations(case: Case, dim: str) -> Iterator[tuple[str, Case]]:
    """Other numbers of microbatches; to fill stages, also those that take another batch."""
    train, ways = case.run.train, case.layout.ways("batch")
    size, far = train.global_batch_size, lambda n: abs(n - train.accumulate)
    divisors = [n for n in range(1, size + 1) if size % n == 0 and n != train.accumulate]
    yield from ((str(n), case.with_train(accumulate=n)) for n in sorted(divisors, key=far))
    for n in nearest(train.accumulate) if dim == "micros" else []:
        if size % n:
            new = nearest(size, n * ways)[0]
            text = f"{n} (global_batch_size {new})"
            yield text, case.with_train(accumulate=n, global_batch_size=new)


def layouts(layout: "Layout", key: str) -> Iterator[tuple[str, "Layout"]]:
    """Layouts over as many devices with another size of an axis, or another number of chunks.

    Not with an axis of size 1: settings that go with it would do nothing, and be refused.
    """
    if key == "chunks":
        least = 2 if layout.pipeline == "circular" else 1
        for n in nearest(layout.chunks):
            if n >= least:
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


def nearest(n: int, unit: int = 1) -> list[int]:
    """Other multiples of unit."""
    start = n // unit
    near = (k * unit for k in range(max(start - STEPS, 1), start + STEPS))
    return sorted((value for value in near if value != n), key=lambda value: abs(value - n))
