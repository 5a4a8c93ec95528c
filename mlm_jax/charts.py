"""Curves over the steps of a run, drawn as SVG figures."""

import html
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from mlm_jax.terminal import short_number

BUCKETS = 200  # of at most 3 points each: 600 a curve are as many as there are pixels
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 600, 270, 58, 10, 228  # of a chart and its plot, in SVG units


class Curve(NamedTuple):
    label: str
    points: list[tuple[float, float]]  # step, value
    lost: list[float]  # steps whose value was not finite

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.points]


def read_curve(label: str, rows: list[dict], key: str) -> Curve:
    points = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    lost = [row["step"] for row in rows if key in row and row[key] is None]
    return Curve(label, points, lost)


def chart(
    title: str,
    unit: str,
    curves: list[Curve],
    *,
    levels: Mapping[str, float] | None = None,
    floor: float | None = None,
    log: bool = False,
) -> str:
    """A figure of curves over steps; levels are horizontal lines, the y axis starts at floor."""
    levels = levels or {}
    heights = [value for curve in curves for value in curve.values] + list(levels.values())
    key = "".join(
        f'<span class="key c{i}">{escaped(curve.label)} {last(curve)}</span>'
        for i, curve in enumerate(curves)
        if curve.values
    )
    caption = f"<figcaption><b>{title}</b> <span>{unit}</span>{key}</figcaption>"
    if not any(curve.values for curve in curves):
        return f'<figure>{caption}<p class="none">nothing logged yet</p></figure>'

    right = WIDTH - (120 if levels else 24)  # the names of levels stand beside the plot
    end = max([step for c in curves for step, _ in c.points] + [s for c in curves for s in c.lost])
    x = _axis(0, end, LEFT, right)
    y = _axis(min(heights) if floor is None or log else floor, max(heights), BOTTOM, TOP, log=log)
    drawn = [*_frame(x, y, right), *_levels(levels, y, right)]
    for i, curve in enumerate(curves):
        drawn += _drawn(curve, i, x, y)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} over steps">'
    return f"<figure>{caption}{svg}{''.join(drawn)}</svg></figure>"


class Axis(NamedTuple):
    ticks: list[float]
    at: Callable[[float], float]  # value -> SVG units


def _axis(low: float, high: float, start: float, end: float, *, log: bool = False) -> Axis:
    """low..high drawn from start to end; the y axis (drawn upward) is widened to whole ticks."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [10.0**decade for decade in decades[:: 1 + len(decades) // 8]]
        low, high = 10.0 ** decades[0], 10.0 ** decades[-1]
        span = math.log10(high / low)
        return Axis(ticks, lambda v: start + (end - start) * math.log10(v / low) / span)
    if math.isclose(low, high):
        low, high = low - abs(low) / 2, high + (abs(high) or 2) / 2
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= 0.999 * rough)
    if end < start:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks, lambda v: start + (end - start) * (v - low) / (high - low))


def _frame(x: Axis, y: Axis, right: float) -> Iterator[str]:
    for tick in y.ticks:
        yield f'<path class="grid" d="M{LEFT},{y.at(tick):.1f}H{right}"/>'
        yield f'<text class="y" x="{LEFT - 8}" y="{y.at(tick) + 4:.1f}">{brief(tick)}</text>'
    for tick in x.ticks:
        yield f'<text class="x" x="{x.at(tick):.1f}" y="{BOTTOM + 18}">{brief(tick)}</text>'
    yield f'<text class="y" x="{right}" y="{HEIGHT - 5}">step</text>'


def _drawn(curve: Curve, i: int, x: Axis, y: Axis) -> Iterator[str]:
    """A line, with dots that tell their value when they are few; a mark on the axis where lost."""
    places = [f"{x.at(step):.1f},{y.at(value):.1f}" for step, value in _thin(curve.points)]
    yield f'<polyline class="c{i}" points="{" ".join(places)}"/>'
    for step, value in curve.points if len(curve.points) <= 50 else ():
        place = f'cx="{x.at(step):.1f}" cy="{y.at(value):.1f}"'
        tip = f"<title>step {step}: {value:.4g}</title>"
        yield f'<circle class="c{i}" {place} r="3">{tip}</circle>'
    for place in sorted({round(x.at(step)) for step in curve.lost}):
        yield f'<path class="lost" d="M{place},{BOTTOM}v-9"><title>not finite</title></path>'


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lowest, highest and last point of each bucket: spikes and the end stay."""
    if len(points) <= 3 * BUCKETS:
        return points
    kept: set[int] = set()
    for i in range(BUCKETS):
        bucket = range(i * len(points) // BUCKETS, (i + 1) * len(points) // BUCKETS)
        by_value = sorted(bucket, key=lambda j: points[j][1])
        kept |= {by_value[0], by_value[-1], bucket[-1]}
    return [points[i] for i in sorted(kept)]


def _levels(levels: Mapping[str, float], y: Axis, right: float) -> Iterator[str]:
    """Dashed lines, their names beside the plot, pushed down where two would overlap."""
    free = 0.0
    for name, level in sorted(levels.items(), key=lambda item: -item[1]):
        free = max(free + 15, y.at(level) + 4)
        yield f'<path class="level" d="M{LEFT},{y.at(level):.1f}H{right}"/>'
        label = f"{escaped(name)} {level:.3g}"
        yield f'<text x="{right + 8}" y="{free:.1f}" class="name">{label}</text>'


def sparkline(values: list[float | None]) -> str:
    """A small curve from 0 to the largest of some values; empty where there are none."""
    known = [(i, value) for i, value in enumerate(values) if value is not None]
    top = max([value for _, value in known], default=0) or 1
    across = 148 / max(len(values) - 1, 1)
    places = " ".join(f"{1 + i * across:.1f},{19 - 18 * value / top:.1f}" for i, value in known)
    line = f'<polyline class="c0" points="{places}"/>'
    return f'<svg class="spark" viewBox="0 0 150 20">{line}</svg>' if known else ""


def is_spiky(curve: Curve) -> bool:
    """Whether one spike would press the rest of the curve flat on a linear axis."""
    values = curve.values
    return bool(values) and min(values) > 0 and max(values) > 30 * statistics.median(values)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def median(curve: Curve) -> float | None:
    return statistics.median(curve.values) if curve.values else None


def last(curve: Curve) -> str:
    return brief(curve.values[-1], 4) if curve.values else "-"


def brief(value: float, digits: int = 10) -> str:
    return short_number(value) if abs(value) >= 10_000 else f"{value:.{digits}g}"


def escaped(value: Any) -> str:
    return html.escape(str(value))
