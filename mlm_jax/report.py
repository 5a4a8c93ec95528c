"""A run as one page: report.html opens in any browser, without a network and without JavaScript."""

import html
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlm_jax.errors import CheckpointError
from mlm_jax.metrics import read_rows
from mlm_jax.terminal import clock, short_number

BUCKETS = 200  # of at most 3 points each: 600 a curve are as many as there are pixels
SAMPLES = 24  # shown, evenly spread over the run
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 600, 270, 58, 10, 228  # of a chart and its plot, in SVG units


def write_report(workdir: Path) -> Path:
    """Writes workdir/report.html from config.json and metrics.jsonl, and returns its path.

    A run that has logged nothing yet has a page too. CheckpointError if this is no workdir.
    """
    try:
        config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{workdir} is not the workdir of a run: {error}") from error
    page = _page(workdir.resolve().name, config, read_rows(workdir / "metrics.jsonl"))
    path, fresh = workdir / "report.html", workdir / "report.html.tmp"
    fresh.write_text(page, encoding="utf-8", errors="replace")  # text may hold half a character
    return fresh.replace(path)


def _page(name: str, config: Mapping[str, Any], rows: list[dict]) -> str:
    train, evals, events = (
        [row for row in rows if row["kind"] == kind] for kind in ("train", "eval", "event")
    )
    named = {row.get("event"): row for row in events}  # the last one of each name
    baselines = named.get("baselines", {})
    baselines = baselines.get("baselines", baselines)  # one dict, or fields of the row itself
    levels = {k: v for k, v in baselines.items() if k not in ("step", "time") and _is_number(v)}

    loss = [_curve("train", train, "loss"), _curve("eval", evals, "eval_loss")]
    bits = _curve("eval", evals, "bits_per_byte")
    norm = _curve("last", train, "grad_norm")
    rate = _curve("last", train, "learning_rate")
    speed = _curve("last", train, "tokens_per_s")
    times = [_curve("step", train, "step_time_s"), _curve("data wait", train, "data_wait_s")]
    charts = [
        _chart("Loss", "nats a token", loss),
        _chart("Bits per byte", "of held-out text", [bits], levels=levels),
        _chart("Learning rate", "", [rate], floor=0),
        _chart("Speed", "tokens a second", [speed], floor=0),
        _chart("Step time", "seconds", times, floor=0),
        _chart("Gradient norm", "before clipping", [norm], floor=0, log=_is_spiky(norm)),
    ]
    parameters = next((row["parameters"] for row in events if "parameters" in row), None)
    clocks = [row["time"] for row in rows if "time" in row]
    facts = {
        "Step": _progress(config, train),
        "Training loss": _last(loss[0]),
        "Held-out loss": _last(loss[1]),
        "Bits per byte": _last(bits),
        "Tokens": short_number(train[-1].get("tokens")) if train else "-",
        "Tokens/s": short_number(_median(speed)),
        "Parameters": short_number(parameters),
        "Wall time": clock(clocks[-1] - clocks[0]) if clocks else "-",
    }
    body = [
        f"<h1>{_text(name)}</h1>",
        _tiles({label: fact for label, fact in facts.items() if fact != "-"}),
        f'<div class="charts">{"".join(charts)}</div>',
        _samples([row for row in events if row.get("event") == "sample"]),
        _completions(named.get("completions", {}).get("completions", [])),
        _settings(config),
    ]
    return PAGE.format(title=_text(name), style=STYLE, body="\n".join(body))


class Curve(NamedTuple):
    label: str
    points: list[tuple[float, float]]  # step, value
    lost: list[float]  # steps whose value was not finite

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.points]


def _curve(label: str, rows: list[dict], key: str) -> Curve:
    points = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
    lost = [row["step"] for row in rows if key in row and row[key] is None]
    return Curve(label, points, lost)


def _chart(
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
        f'<span class="key c{i}">{_text(curve.label)} {_last(curve)}</span>'
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
        yield f'<text class="y" x="{LEFT - 8}" y="{y.at(tick) + 4:.1f}">{_brief(tick)}</text>'
    for tick in x.ticks:
        yield f'<text class="x" x="{x.at(tick):.1f}" y="{BOTTOM + 18}">{_brief(tick)}</text>'
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
        yield f'<text x="{right + 8}" y="{free:.1f}" class="name">{_text(name)} {level:.3g}</text>'


def _tiles(facts: Mapping[str, str]) -> str:
    tiles = (f"<div><dt>{label}</dt><dd>{_text(fact)}</dd></div>" for label, fact in facts.items())
    return f"<dl>{''.join(tiles)}</dl>"


def _samples(samples: list[dict]) -> str:
    if not samples:
        return ""
    count = min(SAMPLES, len(samples))
    shown = [samples[i * (len(samples) - 1) // max(count - 1, 1)] for i in range(count)]
    note = f"{count} of {len(samples)}" if count < len(samples) else ""
    head = "<tr><th>step</th><th>prompt and continuation</th></tr>"
    lines = (f"<tr><td>{row['step']:,}</td><td>{_written(row)}</td></tr>" for row in shown)
    table = f'<table class="samples">{head}{"".join(lines)}</table>'
    return f"<h2>Samples <span>{note}</span></h2>{table}"


def _completions(completions: list[dict]) -> str:
    if not completions:
        return ""
    judged = [item["parses"] for item in completions if item.get("parses") is not None]
    note = f"{sum(judged)} of {len(judged)} parse" if judged else ""
    cards = (f"<div>{_badge(item.get('parses'))}{_written(item)}</div>" for item in completions)
    return f'<h2>Completions <span>{note}</span></h2><div class="cards">{"".join(cards)}</div>'


def _badge(parses: bool | None) -> str:
    if parses is None:
        return ""
    return '<i class="good">parses</i>' if parses else '<i class="bad">does not parse</i>'


def _written(row: Mapping[str, Any]) -> str:
    prompt, text = _text(row.get("prompt", "")), _text(row.get("text", ""))
    return f"<pre><b>{prompt}</b>{text}</pre>"


def _settings(config: Mapping[str, Any]) -> str:
    lines = (f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in _leaves(config))
    return f"<details><summary>Settings</summary><table>{''.join(lines)}</table></details>"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _progress(config: Mapping[str, Any], train: list[dict]) -> str:
    steps = config.get("train", {}).get("steps")
    done = train[-1]["step"] if train else 0
    return f"{done:,} / {steps:,}" if _is_number(steps) else f"{done:,}"


def _is_spiky(curve: Curve) -> bool:
    """Whether one spike would press the rest of the curve flat on a linear axis."""
    values = curve.values
    return bool(values) and min(values) > 0 and max(values) > 30 * statistics.median(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _median(curve: Curve) -> float | None:
    return statistics.median(curve.values) if curve.values else None


def _last(curve: Curve) -> str:
    return _brief(curve.values[-1], 4) if curve.values else "-"


def _brief(value: float, digits: int = 10) -> str:
    return short_number(value) if abs(value) >= 10_000 else f"{value:.{digits}g}"


def _text(value: Any) -> str:
    return html.escape(str(value))


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

STYLE = """
:root { --page: #f6f7f9; --card: #fff; --ink: #1d2430; --soft: #667085; --line: #e4e7ec;
  --c0: #2563eb; --c1: #d9660a; --good: #15803d; --bad: #c8321f; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1318; --card: #181d24; --ink: #e6e9ee; --soft: #98a2b3; --line: #2b323c;
    --c0: #6ea8fe; --c1: #f5a45a; --good: #4ade80; --bad: #ff7a6b; } }
body { max-width: 1160px; margin: 0 auto; padding: 28px 20px 60px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 18px; font-size: 26px; } h2 { margin: 34px 0 10px; font-size: 19px; }
span, dt, th { color: var(--soft); font-weight: normal; } h2 span { font-size: 14px; }
dl { display: flex; flex-wrap: wrap; gap: 12px; } dl div { flex: 1 1 auto; white-space: nowrap; }
dl, dd { margin: 0; } dt { font-size: 13px; }
dd { font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
dl div, figure, .samples, .cards div, details { background: var(--card); border-radius: 10px;
  border: 1px solid var(--line); padding: 10px 14px; }
.charts, .cards { display: grid; gap: 14px; margin-top: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 12px; align-items: baseline; }
figcaption b { font-size: 16px; } figcaption span:nth-child(2) { flex: 1; font-size: 13px; }
figcaption * { white-space: nowrap; }
.key { color: var(--ink); font-size: 13px; font-variant-numeric: tabular-nums; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin: 0 6px 3px 0;
  border-radius: 2px; background: var(--c0); } .key.c1::before { background: var(--c1); }
.none { color: var(--soft); text-align: center; padding: 50px 0; }
svg { display: block; width: 100%; margin-top: 6px; } text { font-size: 13px; fill: var(--soft); }
polyline { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
polyline.c0 { stroke: var(--c0); } polyline.c1 { stroke: var(--c1); }
circle.c0 { fill: var(--c0); } circle.c1 { fill: var(--c1); }
.grid { stroke: var(--line); } .lost { stroke: var(--bad); stroke-width: 2; }
.level { stroke: var(--soft); stroke-width: 1.3; stroke-dasharray: 5 4; }
.x { text-anchor: middle; } .y { text-anchor: end; }
table { border-collapse: collapse; width: 100%; } .samples { padding: 4px 14px; display: block; }
td, th { text-align: left; vertical-align: top; padding: 6px 14px 6px 0; }
td { font-variant-numeric: tabular-nums; } tr + tr td { border-top: 1px solid var(--line); }
.samples td:last-child { width: 100%; }
pre { margin: 0; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 220px; overflow-y: auto; } pre b { color: var(--c0); }
i { float: right; font-style: normal; font-size: 13px; }
.good { color: var(--good); } .bad { color: var(--bad); }
details { margin-top: 34px; } summary { cursor: pointer; font-weight: 600; }
details table { margin-top: 10px; font-size: 13px; } details td { overflow-wrap: anywhere; }
"""
