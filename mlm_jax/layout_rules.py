"""What a layout cannot be, whatever the model: sizes, settings and rules that make no sense."""

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlm_jax.errors import LayoutError
from mlm_jax.mesh import MESH_AXES, shown_sizes

NOT_YET = {"ep": "expert"}
ACTIVATIONS = (
    ("batch", "seq", "heads"), ("batch", "seq", "kv_heads"), ("batch", "seq", "mlp"),
    ("batch", "seq", "vocab"), ("batch", "residual_seq"),
)  # fmt: skip
STAGED = {"layer": "pp", "batch": "dp", "seq": "cp", "residual_seq": "cp"}
OUTSIDE_STAGES = ("vocab", "vocab_in", "vocab_embed", "position")  # of weights without layers


def refuse(what: str, problems: Sequence[str]) -> None:
    if problems:
        raise LayoutError(f"{what}:\n  " + "\n  ".join(problems))


def bad_sizes(sizes: Mapping[str, int], count: int) -> list[str]:
    """Sizes of axes that are none, or do not make up the devices."""
    fits = lambda n: isinstance(n, int) and n >= 1  # noqa: E731
    if wrong := [f"layout.{a}={n!r} is no size; try 1" for a, n in sizes.items() if not fits(n)]:
        return wrong
    problems = [
        f"layout.{axis}={sizes[axis]}: {name} parallelism is not built yet; try {axis}=1"
        for axis, name in NOT_YET.items()
        if sizes[axis] > 1
    ]
    if (used := math.prod(sizes.values())) != count:
        others = used // sizes["dp"]
        fit = f"dp={count // others}" if count % others == 0 else f"sizes whose product is {count}"
        shown = shown_sizes(sizes) if used > 1 else "every size 1"
        problems.append(f"{shown} takes {used} of {count} devices; try {fit}")
    return problems


def idle_settings(
    sizes: Mapping[str, int], sequence_parallel: bool, zero: int, pipeline: str | None,
    chunks: int | None, cp_attention: str | None,
) -> list[str]:  # fmt: skip
    """Settings that would do nothing, or contradict each other."""

    def idle(key: str, value: Any, axis: str) -> tuple[bool, str]:
        wrong = sizes[axis] == 1 and value not in (None, False, 0)
        return wrong, f"layout.{key}={value!r} does nothing with layout.{axis}=1; leave it out"

    checks = [
        idle("sequence_parallel", sequence_parallel, "tp"),
        (zero == 3,
         "layout.zero=3: weights are split by layout.fsdp; set that instead of layout.dp"),
        (zero not in (0, 1, 2, 3), f"layout.zero={zero!r} is no stage of ZeRO; try 0, 1 or 2"),
        idle("zero", zero if zero in (1, 2) else None, "dp"),
        *[(value is not None and value not in known,
           f"layout.{key}={value!r} is not one of {either(known)}")
          for key, value, known in (("pipeline", pipeline, ("gpipe", "circular", "1f1b")),
                                    ("cp_attention", cp_attention, ("ring", "all_gather")))],
        idle("pipeline", pipeline, "pp"),
        idle("chunks", chunks, "pp"),
        (sizes["pp"] > 1 and pipeline == "gpipe" and (chunks or 1) > 1,
         f"layout.pipeline='gpipe' has one chunk a stage, not layout.chunks={chunks}; try"
         " circular"),
        (sizes["pp"] > 1 and pipeline == "circular" and chunks == 1,
         "layout.pipeline='circular' with layout.chunks=1 is gpipe; try chunks 2"),
        idle("cp_attention", cp_attention, "cp"),
    ]  # fmt: skip
    return [message for wrong, message in checks if wrong]


def bad_rules(
    table: Mapping[str, tuple[str, ...]], weights: Sequence, known: Iterable[str]
) -> list[str]:
    """Rows of a table, and dims of weights, that name what there is not."""
    dims = {*known, *(dim for _, own in weights for dim in own)}
    problems = []
    for dim, axes in table.items():
        if dim not in dims:
            near = difflib.get_close_matches(dim, dims, n=1) or sorted(known)
            problems.append(f"layout.rules: no array has a dim {dim!r}; try {either(near)}")
        problems += [
            f"layout.rules: {dim}={a!r} is no mesh axis; try {either(MESH_AXES)}"
            for a in axes
            if a not in MESH_AXES
        ]
    for regex, _ in weights:
        try:
            re.compile(regex)
        except re.error as why:
            problems.append(f"layout.weights: {regex!r} is no regular expression: {why}")
    problems += [
        f"layout.weights: {regex}={dim!r} has no rule; try {either(table)}"
        for regex, own in weights
        for dim in own
        if dim not in table
    ]
    return problems


def clashing_rules(
    table: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], usual: Mapping
) -> list[str]:
    """Rows that cannot be together: on one activation, or with the stages of pp.

    usual: rows that nobody has set by hand; a row that somebody has is the one to be changed.
    """
    live = {dim: [a for a in axes if sizes[a] > 1] for dim, axes in table.items()}
    problems, wrong = [], set()

    def refused(dim: str, why: str, instead: Iterable[str]) -> None:
        wrong.add(dim)
        problems.append(f"layout.rules: {row(dim, table[dim])} {why}; try {row(dim, instead)}")

    for dim, axes in live.items():
        if twice := {a for a in axes if axes.count(a) > 1}:
            refused(dim, f"names {either(sorted(twice))} twice", dict.fromkeys(table[dim]))
    clashes: dict[str, list[str]] = {}
    for pair in dict.fromkeys(p for dims in ACTIVATIONS for p in itertools.combinations(dims, 2)):
        if {*live[pair[0]]} & {*live[pair[1]]}:
            other, dim = sorted(pair, key=lambda d: table[d] != usual[d])
            clashes.setdefault(dim, []).append(other)
    for dim, others in clashes.items():
        taken = {a for other in others for a in live[other]}
        refused(
            dim, f"shares activations with {' and '.join(row(d, table[d]) for d in others)},"
            " and an axis splits one dim of an array", [a for a in table[dim] if a not in taken],
        )  # fmt: skip
    seq, residual_seq = live["seq"], live["residual_seq"]
    if residual_seq[: len(seq)] != seq and not wrong & {"seq", "residual_seq"}:
        further = [a for a in table["residual_seq"] if a not in seq]
        refused(
            "residual_seq", f"does not begin with {row('seq', seq)}, which it is to split further",
            [*seq, *further],
        )  # fmt: skip
    for dim in table if sizes["pp"] > 1 else ():
        right = of_stages(dim, table[dim])
        if {a for a in right if sizes[a] > 1} != {*live[dim]} and dim not in wrong:
            refused(
                dim, f"does not go with layout.pp={sizes['pp']}: stages have pp split layers, dp"
                " batches and cp sequences", right,
            )  # fmt: skip
    return problems


def row(dim: str, axes: Iterable[str]) -> str:
    return f"{dim}={','.join(axes)}"


def of_stages(dim: str, axes: Sequence[str]) -> list[str]:
    """The axes that may split a dim under pp, where pp, dp and cp are split by models.pipeline."""
    if dim == "layer":
        return ["pp"]
    if dim in STAGED:
        return [STAGED[dim], *(a for a in axes if a not in STAGED.values())]
    return [a for a in axes if a != "dp" and (a != "pp" or dim in OUTSIDE_STAGES)]


def either(values: Iterable[Any]) -> str:
    *most, last = [str(v) for v in values]
    return f"{', '.join(most)} or {last}" if most else last
