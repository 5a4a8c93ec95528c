"""A run as one page: report.html opens in any browser, without a network and without JavaScript."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlm_jax.charts import (
    brief,
    chart,
    escaped,
    is_number,
    is_spiky,
    last,
    median,
    read_curve,
    sparkline,
)
from mlm_jax.errors import CheckpointError
from mlm_jax.metrics import read_rows
from mlm_jax.terminal import clock, short_number

TRAIN_CURVES = (
    "learning_rate", "grad_norm", "tokens_per_s", "tflops_per_device", "mfu", "memory_gib",
)  # fmt: skip
SAMPLES = 24  # shown, evenly spread over the run


def write_report(workdir: Path) -> Path:
    """Writes workdir/report.html from what the workdir holds, and returns its path.

    A run that has logged nothing yet has a page too. CheckpointError if this is no workdir.
    """
    try:
        config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{workdir} is not the workdir of a run: {error}") from error
    rows, profile = read_rows(workdir / "metrics.jsonl"), workdir / "profile" / "operations.txt"
    operations = profile.read_text(encoding="utf-8") if profile.exists() else ""
    page = _page(workdir.resolve().name, config, rows, operations)
    path, fresh = workdir / "report.html", workdir / "report.html.tmp"
    fresh.write_text(page, encoding="utf-8", errors="replace")  # text may hold half a character
    return fresh.replace(path)


def _page(name: str, config: Mapping[str, Any], rows: list[dict], operations: str) -> str:
    train, evals, events = (
        [row for row in rows if row["kind"] == kind] for kind in ("train", "eval", "event")
    )
    named = {row.get("event"): row for row in events}  # the last one of each name
    baselines = named.get("baselines", {})
    baselines = baselines.get("baselines", baselines)  # one dict, or fields of the row itself
    levels = {k: v for k, v in baselines.items() if k not in ("step", "time") and is_number(v)}

    curve = {key: read_curve("last", train, key) for key in TRAIN_CURVES}
    loss = [read_curve("train", train, "loss"), read_curve("eval", evals, "eval_loss")]
    bits, norm = read_curve("eval", evals, "bits_per_byte"), curve["grad_norm"]
    times = [
        read_curve("step", train, "step_time_s"),
        read_curve("data wait", train, "data_wait_s"),
    ]
    charts = [
        chart("Loss", "nats a token", loss),
        chart("Bits per byte", "of held-out text", [bits], levels=levels),
        chart("Learning rate", "", [curve["learning_rate"]], floor=0),
        chart("Gradient norm", "before clipping", [norm], floor=0, log=is_spiky(norm)),
        chart("Speed", "tokens a second", [curve["tokens_per_s"]], floor=0),
        chart("Step time", "seconds", times, floor=0),
    ]
    where = named.get("compiled", {}).get("device_kind", "")
    for title, unit, key in (
        ("Work", "TFLOP/s a device", "tflops_per_device"),
        ("Memory", f"GiB, the most so far{', of the process' * (where == 'cpu')}", "memory_gib"),
    ):
        if curve[key].values:  # not every device tells
            charts.append(chart(title, unit, [curve[key]], floor=0))
    parameters = next((row["parameters"] for row in events if "parameters" in row), None)
    clocks = [row["time"] for row in rows if "time" in row]
    mfu = median(curve["mfu"])
    facts = {
        "Step": _progress(config, train),
        "Training loss": last(loss[0]),
        "Held-out loss": last(loss[1]),
        "Bits per byte": last(bits),
        "Tokens": short_number(train[-1].get("tokens")) if train else "-",
        "Tokens/s": short_number(median(curve["tokens_per_s"])),
        "MFU": f"{mfu:.1%}" if mfu is not None else "-",
        "Parameters": short_number(parameters),
        "Wall time": clock(clocks[-1] - clocks[0]) if clocks else "-",
    }
    body = [
        f"<h1>{escaped(name)}</h1>",
        _tiles({label: fact for label, fact in facts.items() if fact != "-"}),
        f'<div class="charts">{"".join(charts)}</div>',
        _groups(train[-1] if train else {}),
        _activations(train[-1] if train else {}),
        _samples([row for row in events if row.get("event") == "sample"]),
        _completions(named.get("completions", {}).get("completions", [])),
        _folded("Profile", f"<pre>{escaped(operations)}</pre>") if operations else "",
        _settings(config),
    ]
    return PAGE.format(title=escaped(name), style=STYLE, body="\n".join(body))


def _tiles(facts: Mapping[str, str]) -> str:
    tiles = (
        f"<div><dt>{label}</dt><dd>{escaped(fact)}</dd></div>" for label, fact in facts.items()
    )
    return f"<dl>{''.join(tiles)}</dl>"


def _groups(row: Mapping[str, Any]) -> str:
    """Norms of the weights, where watch.groups asked for them."""
    if "param_norms" not in row:
        return ""
    params, grads, updates = (row[f"{name}_norms"] for name in ("param", "grad", "update"))
    by_layer = row["by_layer"]["grad_norms"]
    lines = [
        [escaped(name), *(_figure(x[name]) for x in (params, grads, updates)),
         _share(updates[name], params[name]), sparkline(by_layer.get(name, []))]
        for name in params
    ]  # fmt: skip
    head = ["weight", "norm", "gradient", "update", "update / norm", "gradient by layer"]
    return f"<h2>Weights <span>at step {row['step']:,}</span></h2>{_table(head, lines)}"


def _activations(row: Mapping[str, Any]) -> str:
    """Sizes of activations, where watch.activations asked for them."""
    if "activation_rms" not in row:
        return ""
    kinds = [f"activation_{kind}" for kind in ("mean_abs", "rms", "max")]
    by_layer = row["by_layer"]["activation_rms"]
    lines = [
        [escaped(name), *(_figure(row[k][name]) for k in kinds), sparkline(by_layer.get(name, []))]
        for name in row["activation_rms"]
    ]
    head = ["output of", "mean |x|", "root mean square", "max |x|", "root mean square by layer"]
    return f"<h2>Activations <span>at step {row['step']:,}</span></h2>{_table(head, lines)}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    rest = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f'<table class="figures"><tr>{top}</tr>{rest}</table>'


def _figure(value: float | None) -> str:
    return "not finite" if value is None else brief(value, 3)


def _share(a: float | None, b: float | None) -> str:
    return brief(a / b, 3) if a is not None and b else "-"


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
    prompt, new = escaped(row.get("prompt", "")), escaped(row.get("text", ""))
    return f"<pre><b>{prompt}</b>{new}</pre>"


def _settings(config: Mapping[str, Any]) -> str:
    lines = (f"<tr><td>{escaped(k)}</td><td>{escaped(v)}</td></tr>" for k, v in _leaves(config))
    return _folded("Settings", f"<table>{''.join(lines)}</table>")


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _progress(config: Mapping[str, Any], train: list[dict]) -> str:
    steps = config.get("train", {}).get("steps")
    done = train[-1]["step"] if train else 0
    return f"{done:,} / {steps:,}" if is_number(steps) else f"{done:,}"


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
dl div, figure, .samples, .figures, .cards div, details { background: var(--card);
  border-radius: 10px; border: 1px solid var(--line); padding: 10px 14px; }
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
.figures { padding: 4px 14px; border-collapse: separate; border-spacing: 0; font-size: 13px; }
.figures td { padding: 3px 14px 3px 0; } .spark { width: 150px; height: 20px; margin: 0; }
pre { margin: 0; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 220px; overflow-y: auto; } pre b { color: var(--c0); }
i { float: right; font-style: normal; font-size: 13px; }
.good { color: var(--good); } .bad { color: var(--bad); }
details { margin-top: 34px; } details + details { margin-top: 14px; }
details pre { max-height: none; white-space: pre; overflow-x: auto; margin-top: 10px; }
summary { cursor: pointer; font-weight: 600; }
details table { margin-top: 10px; font-size: 13px; } details td { overflow-wrap: anywhere; }
"""
