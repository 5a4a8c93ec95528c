"""Where the time of a few steps goes: a trace to look at, and a table of their operations.

jax is imported late: a range that makes no sense is refused at once.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlm_jax.errors import ConfigError

SHOWN = 30  # rows of the table; operations.json has all


class Span(NamedTuple):
    """The steps first to last, both included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Span(10, 12) of '10:13', as Python slices. Raises ConfigError for what is no range."""
        match = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
        first, stop = (int(n) for n in match.groups()) if match else (0, 0)
        if not 1 <= first < stop:
            raise ConfigError(
                f"--profile {text!r} is no range of steps; 10:13 are the steps 10, 11 and 12"
            )
        return cls(first, stop - 1)

    def check(self, done: int, steps: int) -> None:
        """Raises ConfigError unless a run from `done` steps to `steps` takes all of these."""
        if done < self.first and self.last <= steps:
            return
        asked = f"--profile {self.first}:{self.last + 1}"
        if done >= steps:
            raise ConfigError(f"{asked}: no step is left of train.steps={steps}; raise it")
        last = min(done + 3, steps)
        near = f"{max(last - 2, done + 1)}:{last + 1}"
        raise ConfigError(
            f"{asked}: this run takes the steps {done + 1} to {steps}; try --profile {near}"
        )


class Operation(NamedTuple):
    """A row of the table. Times are of the operation itself, without others that it contains."""

    name: str  # of the instruction in XLA's program
    origin: str  # pass, JAX scopes and primitive: backward mlp/dot_general
    ms_per_step: float  # summed over threads, streams and devices
    share: float  # of the time of all operations
    calls_per_step: float


class Profiler:
    """Traces what runs between start and stop into `folder`, then writes operations.txt and .json.

    The trace opens in TensorBoard (pip install xprof; tensorboard --logdir FOLDER), and its
    trace.json.gz in ui.perfetto.dev.
    """

    def __init__(self, folder: Path):
        self.folder, self.first = folder, 0

    def start(self, step: int) -> None:
        """Before the step of this number is given to the device, which is idle."""
        import jax

        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python functions are ten times the rest
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self.first = step

    def stop(self, step: int, program: Any) -> None:
        """After this step has ended on the device. program: the compiled step."""
        import jax

        jax.profiler.stop_trace()
        trace = max(self.folder.glob("plugins/profile/*/*.xplane.pb"))
        span, self.first = Span(self.first, step), 0
        rows = operations(jax.profiler.ProfileData.from_file(str(trace)), program.as_text(), span)
        content = {
            "steps": span, "device_kind": jax.devices()[0].device_kind,
            "trace": str(trace.parent.relative_to(self.folder)),
            "operations": [row._asdict() for row in rows],
        }  # fmt: skip
        (self.folder / "operations.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.folder / "operations.txt").write_text(table(rows, span) + "\n")


def operations(trace: Any, hlo: str, span: Span) -> list[Operation]:
    """All operations of one XLA program in a jax.profiler.ProfileData, most time first.

    hlo: the program's text.
    """
    steps = span.last - span.first + 1
    module = re.match(r"HloModule ([\w.\-]+)", hlo)
    origin_of = origins(hlo)
    total, calls = defaultdict(float), defaultdict(int)
    # With GPUs, a thread of the host is only where a kernel was launched.
    gpus = [plane for plane in trace.planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or trace.planes:
        for line in plane.lines:
            for name, ns in self_times(_spans(line, module[1] if module else "")):
                total[name] += ns
                calls[name] += 1
    all_ns = sum(total.values())
    return [
        Operation(name, origin_of.get(name, ""), ns / 1e6 / steps, ns / all_ns, calls[name] / steps)
        for name, ns in sorted(total.items(), key=lambda item: -item[1])
    ]


def _spans(line: Any, module: str) -> Iterator[tuple[float, float, str]]:
    """(start, end, name) of the program's operations on a thread of the host or stream of a GPU."""
    for event in line.events:
        stats = dict(event.stats)
        if "hlo_op" in stats and stats.get("hlo_module") == module:
            yield event.start_ns, event.start_ns + event.duration_ns, str(stats["hlo_op"])


def self_times(spans: Iterable[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """(name, time) of each span less the time of those inside it. A loop contains its body."""
    open_spans: list[tuple[float, str]] = []  # end, name
    own: list[float] = []
    for start, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_spans and open_spans[-1][0] <= start:
            yield open_spans.pop()[1], own.pop()
        if own:
            own[-1] -= min(end, open_spans[-1][0]) - start
        open_spans.append((end, name))
        own.append(end - start)
    while open_spans:
        yield open_spans.pop()[1], own.pop()


def origins(hlo: str) -> dict[str, str]:
    """Where each instruction of a program comes from: 'backward mlp/dot_general'."""
    lines = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]+)"', hlo, re.MULTILINE)
    return {name: origin(path) for name, path in lines}


def origin(path: str) -> str:
    """'backward mlp/dot_general' of transpose(jvp())/while/body/checkpoint/mlp/dot_general."""
    path = re.sub(r"\(([^():]+)(:[^():]+)+\)", r"\1, ...", path)  # several made one by XLA
    phase = next((name for mark, name in PHASES.items() if mark in path), "")
    scopes = re.sub(r"^jit\(\w+\)/|\b(jit|jvp|transpose|vmap)\(|\)", "", path).split("/")
    return " ".join([phase, "/".join(s for s in scopes if s and s not in STRUCTURE)]).strip()


PHASES = {"rematted_computation": "recomputed", "transpose(": "backward", "jvp(": "forward"}
STRUCTURE = {
    "while", "body", "cond", "closed_call", "eval_jaxpr", "checkpoint", "rematted_computation",
}  # fmt: skip


def table(rows: list[Operation], span: Span) -> str:
    """The operations that take most time, as text."""
    steps = f"steps {span.first} to {span.last}" if span.last > span.first else f"step {span.first}"
    all_ms, shown = sum(row.ms_per_step for row in rows), rows[:SHOWN]
    width = max([len(row.name) for row in shown], default=0)
    lines = [
        f"Operations of {steps}: {all_ms:.1f} ms a step, summed over threads, streams and devices.",
        f"{'ms/step':>9}  {'share':>6}  {'calls':>6}  {'operation':{width}}  from",
    ]
    lines += [
        f"{row.ms_per_step:9.2f}  {row.share:6.1%}  {row.calls_per_step:6.4g}"
        f"  {row.name:{width}}  {row.origin}"
        for row in shown
    ]
    if rows[SHOWN:]:
        rest = sum(row.ms_per_step for row in rows[SHOWN:])
        lines.append(f"{rest:9.2f}  {rest / all_ms:6.1%}  {'':6}  {len(rows) - SHOWN} more")
    return "\n".join(lines)
