"""The last words of a run: what was reached, beside what; and what to do next."""

import textwrap
from pathlib import Path

from mlm_jax.metrics import read_rows


def summary(workdir: Path) -> str:
    """Result, baselines, completions, the report's path, commands to try; from metrics.jsonl."""
    rows = read_rows(workdir / "metrics.jsonl")
    events = {row.get("event"): row for row in rows if row["kind"] == "event"}
    parts = []
    if evals := [row for row in rows if row["kind"] == "eval"]:
        parts.append(result(evals[-1], events.get("baselines", {})))
    if "completions" in events:
        parts.append(completions(events["completions"]["completions"]))
    parts.append(f"Report: {workdir / 'report.html'}")
    if (profile := workdir / "profile" / "operations.txt").exists():
        parts.append(f"Profile: {profile}")
    talks = "sample" in events and (workdir / "tokenizer").exists()
    parts.append(
        "Try next:\n"
        + f'  mlm-jax generate --workdir {workdir} --prompt "def main(" --temperature 0.5\n' * talks
        + "  mlm-jax explain --config llama:3-8b --config.layout.fsdp=8 --config.layout.tp=2\n"
        "  JAX_NUM_CPU_DEVICES=8 mlm-jax train --config quickstart --config.layout.preset=fsdp_tp"
        " --config.train.steps=20 --workdir runs/eight"
    )
    return "\n\n".join(parts)


def result(row: dict, baselines: dict) -> str:
    if row.get("bits_per_byte") is None:
        return f"Held-out loss {row['eval_loss']:.3f} nats a token at step {row['step']}."
    lines = [f"{row['bits_per_byte']:.3f} bits per byte of held-out text at step {row['step']}."]
    names = {"unigram": "tokens by their frequency alone", "xz": "xz, on all of the text at once"}
    lines += [f"  {baselines[k]:.3f} {name}" for k, name in names.items() if k in baselines]
    return "\n".join(lines)


def completions(rows: list[dict]) -> str:
    """Each prompt with its best completion, and the share of all that Python parses."""
    tries, accepted = (sum(row[key] for row in rows) for key in ("best_of", "accepted"))
    lines = [
        f"Completions, the best of {rows[0]['best_of']} each. Of all {tries}, {accepted} parse"
        f" ({accepted / tries:.0%}) once cut after their last whole statement:"
    ]
    for row in rows:
        verdict = "parses" if row["parses"] else "does not parse"
        lines += [f"--- {verdict}", textwrap.indent((row["prompt"] + row["text"]).rstrip(), "    ")]
    return "\n".join(lines)
