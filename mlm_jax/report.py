"""A run as one page: report.html opens in any browser, without a network and without JavaScript."""

import html
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlm_jax.errors import CheckpointError
from mlm_jax.metrics import clock, read_rows, short_number

BUCKETS = 200  # of at most 3 points each: 600 a curve are as many as there are pixels
SAMPLES = 24  # shown, evenly spread over the run
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 600, 270, 58, 10, 236  # of a chart and its plot, in SVG units


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
    charts = [
        _chart("Loss", "nats a token", loss),
        _chart("Bits per byte", "of held-out text", [bits], levels=levels),
        _chart("Learning rate", "", [rate], floor=0),
        _chart("Speed", "tokens a second", [speed], floor=0),
        _chart("Gradient norm", "before clipping", [norm], floor=0, log=_is_spiky(norm)),
    ]
    facts = {
        "Step": _progress(config, train),
        "Training loss": _last(loss[0]),
        "Held-out loss": _last(loss[1]),
        "Bits per byte": _last(bits),
        "Tokens": short_number(train[-1].get("tokens")) if train else "-",
        "Tokens a second": short_number(_median(speed)),
        "Parameters": short_number(
            next((e["parameters"] for e in events if "parameters" in e), None)
        ),
        "Wall time": clock(rows[-1]["time"] - rows[0]["time"]) if rows else "-",
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
    points: list[tuple[float, float | None]]  # step and value; None where it was not finite

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.points if value is not None]


def _curve(label: str, rows: list[dict], key: str) -> Curve:
    points = [(r["step"], r[key] if _is_number(r[key]) else None) for r in rows if key in r]
    return Curve(label, _thin(points))


def _thin(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """The lowest, highest and last point of each bucket: spikes, gaps and the end stay."""
    if len(points) <= 3 * BUCKETS:
        return points
    height = [-math.inf if value is None else value for _, value in points]
    kept: set[int] = set()
    for i in range(BUCKETS):
        bucket = range(i * len(points) // BUCKETS, (i + 1) * len(points) // BUCKETS)
        kept |= {min(bucket, key=height.__getitem__), max(bucket, key=height.__getitem__)}
        kept.add(bucket[-1])
    return [points[i] for i in sorted(kept)]


def _chart(
    title: str,
    unit: str,
    curves: list[Curve],
    *,
    levels: Mapping[str, float] | None = None,
    floor: float | None = None,
    log: bool = False,
) -> str:
    """A figure of curves over steps; levels are horizontal lines, floor is where the y axis starts."""
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

    right = WIDTH - (120 if levels else 14)  # the names of levels stand beside the plot
    end = max(step for curve in curves for step, _ in curve.points)
    x = _axis(0, end, LEFT, right)
    y = _axis(min(heights) if floor is None or log else floor, max(heights), BOTTOM, TOP, log=log)
    drawn = [
        *(f'<path class="grid" d="M{LEFT},{y.at(t):.1f}H{right}"/>' for t in y.ticks),
        *(
            f'<text x="{LEFT - 8}" y="{y.at(t) + 4:.1f}" class="y">{_tick(t)}</text>'
            for t in y.ticks
        ),
        *(
            f'<text x="{x.at(t):.1f}" y="{BOTTOM + 18}" class="x">{_tick(t)}</text>'
            for t in x.ticks
        ),
        f'<text x="{right}" y="{HEIGHT - 2}" class="y">step</text>',
        *_levels(levels, y, right),
        *(_drawn(curve, i, x, y) for i, curve in enumerate(curves)),
    ]
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
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= 0.999 * rough)
    if end < start:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks, lambda v: start + (end - start) * (v - low) / (high - low))


def _drawn(curve: Curve, i: int, x: Axis, y: Axis) -> str:
    """Line through the finite points, dots when they are few, a mark on the axis for the others."""
    path, lost, pen_up = "", "", True
    for step, value in curve.points:
        if value is None:
            lost += f"M{x.at(step):.1f},{BOTTOM}v-8"
        else:
            path += f"{'M' if pen_up else 'L'}{x.at(step):.1f},{y.at(value):.1f}"
            path += "h0" if pen_up else ""  # or a point alone between two gaps would not show
        pen_up = value is None
    dots = [
        f'<circle class="c{i}" cx="{x.at(step):.1f}" cy="{y.at(value):.1f}" r="3">'
        f"<title>step {step}: {value:.4g}</title></circle>"
        for step, value in curve.points
        if value is not None and len(curve.points) <= 50
    ]
    mark = f'<path class="lost" d="{lost}"><title>not finite</title></path>' if lost else ""
    return f'<path class="c{i}" d="{path}"/>{"".join(dots)}{mark}'


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
    lines = (f"<tr><td>{row['step']:,}</td><td>{_written(row)}</td></tr>" for row in shown)
    return f"""<h2>Samples <span>{note}</span></h2>
<table class="samples"><tr><th>step</th><th>prompt and continuation</th></tr>{"".join(lines)}</table>"""


def _completions(completions: list[dict]) -> str:
    if not completions:
        return ""
    judged = [item["parses"] for item in completions if item.get("parses") is not None]
    note = f"{sum(judged)} of {len(judged)} parse" if judged else ""
    badge = {True: '<i class="good">parses</i>', False: '<i class="bad">does not parse</i>'}
    cards = (f"<div>{badge.get(c.get('parses'), '')}{_written(c)}</div>" for c in completions)
    return f"""<h2>Completions <span>{note}</span></h2><div class="cards">{"".join(cards)}</div>"""


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
    return f"{curve.values[-1]:.4g}" if curve.values else "-"


def _tick(value: float) -> str:
    return short_number(value) if abs(value) >= 10_000 else f"{value:.10g}"


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
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(125px, 1fr)); gap: 12px; }
dl, dd { margin: 0; } dt { font-size: 13px; }
dd { font-size: 21px; font-weight: 600; white-space: nowrap; font-variant-numeric: tabular-nums; }
dl div, figure, .samples, .cards div, details { background: var(--card); border-radius: 10px;
  border: 1px solid var(--line); padding: 10px 14px; }
.charts, .cards { display: grid; gap: 14px; margin-top: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; } figcaption { display: flex; gap: 12px; align-items: baseline; }
figcaption b { font-size: 16px; } figcaption span:nth-child(2) { flex: 1; font-size: 13px; }
.key { color: var(--ink); font-size: 13px; font-variant-numeric: tabular-nums; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin: 0 6px 3px 0;
  border-radius: 2px; background: var(--c0); } .key.c1::before { background: var(--c1); }
.none { color: var(--soft); text-align: center; padding: 50px 0; }
svg { display: block; width: 100%; margin-top: 6px; } svg text { font-size: 13px; fill: var(--soft); }
svg path { fill: none; stroke-width: 2; stroke-linecap: round; stroke-linejoin: round; }
path.c0 { stroke: var(--c0); } path.c1 { stroke: var(--c1); }
circle.c0 { fill: var(--c0); } circle.c1 { fill: var(--c1); }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .lost { stroke: var(--bad); }
svg .level { stroke: var(--soft); stroke-width: 1.3; stroke-dasharray: 5 4; }
.x { text-anchor: middle; } .y { text-anchor: end; }
table { border-collapse: collapse; width: 100%; } .samples { padding: 4px 14px; display: block; }
td, th { text-align: left; vertical-align: top; padding: 6px 14px 6px 0; }
td { font-variant-numeric: tabular-nums; } tr + tr td { border-top: 1px solid var(--line); }
.samples td:last-child { width: 100%; }
pre { margin: 0; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 320px; overflow-y: auto; } pre b { color: var(--c0); }
i { float: right; font-style: normal; font-size: 13px; }
.good { color: var(--good); } .bad { color: var(--bad); }
details { margin-top: 34px; } summary { cursor: pointer; font-weight: 600; }
details table { margin-top: 10px; font-size: 13px; } details td { overflow-wrap: anywhere; }
"""
