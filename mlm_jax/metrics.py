"""What a run tells: metrics.jsonl, TensorBoard and the terminal; and how much work a step is."""

import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TextIO

from mlm_jax.errors import CheckpointError

log = logging.getLogger(__name__)

KINDS = ("train", "eval", "event")


class MetricsLog:
    """Appends rows to `workdir/metrics.jsonl`; TensorBoard and the terminal see the same rows.

    A row is a JSON object on a line: kind, step (updates done), time (Unix seconds), its values.
    What a killed run wrote after `resume_step` is cut first, in the file and in TensorBoard.
    One process of a run writes; the others make no MetricsLog.
    """

    def __init__(self, workdir: Path, *, resume_step: int = 0, terminal: "Terminal | None" = None):
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        _cut(path, resume_step)
        self._file = path.open("a", encoding="ascii")
        self._board = _open_board(workdir / "tensorboard", resume_step)
        self._terminal = terminal

    def write(self, kind: str, step: int, **values: Any) -> None:
        """kind: train | eval | event; values: what JSON holds, or numpy and jax numbers.

        NaN and infinity become null. An unknown kind raises ValueError, other objects TypeError.
        """
        if kind not in KINDS:
            raise ValueError(f"{kind=} is no kind of row; there are {', '.join(KINDS)}")
        row = _strict({"kind": kind, "step": step, "time": round(time.time(), 3), **values})
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._board and kind != "event":
            self._board.write(row)
        if self._terminal:
            self._terminal.update(row)

    def names(self, step: int) -> set[str]:
        """Kinds of rows and names of events that metrics.jsonl has at a step."""
        rows = [row for row in read_rows(Path(self._file.name)) if row["step"] == step]
        return {row["kind"] for row in rows} | {row.get("event", "") for row in rows}

    def close(self) -> None:
        if self._file.closed:
            return
        self._file.close()
        if self._board:
            self._board.close()
        if self._terminal:
            self._terminal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, oldest first; none if there is no file.

    A last line torn by a kill is left out. A damaged line before it raises CheckpointError.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise CheckpointError(
                    f"{path} line {number} is not JSON ({error}); delete that line to go on"
                ) from error
    return rows


class Terminal:
    """A run as a person sees it: one live line on a terminal, else a plain line for a train row.

    Eval rows and samples (event rows with event="sample") get lines of their own above it.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None):
        """stream: sys.stderr if None, since results go to stdout."""
        self._total = total_steps
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = self._live and not os.environ.get("NO_COLOR")
        self._encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._done_mark, self._rest_mark = (
            "━─" if self._encoding.lower().startswith("utf") else "=."
        )
        self._bits_per_byte: float | None = None
        self._line = ""

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows one row of metrics.jsonl."""
        if row["kind"] == "train":
            self._show_step(row)
        elif row["kind"] == "eval":
            self._bits_per_byte = row.get("bits_per_byte", self._bits_per_byte)
            fields = [f"eval  step {row['step']}", f"loss {_number(row.get('eval_loss'))}"]
            if row.get("bits_per_byte") is not None:
                fields.append(f"bits/byte {_number(row['bits_per_byte'])}")
            self.say("  ".join(fields))
        elif row.get("event") == "compiling":
            resumed = f"resuming at step {row['step']}: " if row["step"] else ""
            self.say(f"{resumed}compiling a step of {short_number(row['parameters'])} parameters")
        elif row.get("event") == "sample":
            head = f"sample  step {row['step']}  "
            prompt, text = (
                self._one_line(row.get(key, ""), len(head)) for key in ("prompt", "text")
            )
            self.say(f"{head}{prompt}\n{'':>{len(head)}}{text}")

    def say(self, text: str) -> None:
        """Prints a line, or several, above the bar. A model's text may hold any character."""
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "·", text)  # would move the cursor
        text = text.encode(self._encoding, "backslashreplace").decode(self._encoding)
        if self._live:
            text = f"\r\x1b[K{text}\n{self._line}"  # over the bar, which comes back below
            print(text, end="", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the last bar standing and the cursor on a line of its own."""
        if self._line:
            print(file=self._stream, flush=True)
            self._line = ""

    def _show_step(self, row: Mapping[str, Any]) -> None:
        step, total = row["step"], max(self._total, 1)
        speed = f"{short_number(row.get('tokens_per_s'))} tok/s"
        left = row.get("eta_s")
        if left is None and row.get("step_time_s") is not None:
            left = max(total - step, 0) * row["step_time_s"]
        eta = "ETA " + clock(left)
        if not self._live:
            fields = [f"step {step}/{total}", f"loss {_number(row.get('loss'))}"]
            fields += [f"grad norm {_number(row.get('grad_norm'))}"]
            fields += [f"lr {_number(row.get('learning_rate'))}", speed]
            if row.get("tflops_per_device") is not None:
                fields.append(f"{row['tflops_per_device']:.3g} TFLOP/s")
            if row.get("mfu") is not None:
                fields.append(f"MFU {row['mfu']:.1%}")
            return self.say("  ".join([*fields, eta]))

        fields = [f"{100 * step // total}%", f"loss {_number(row.get('loss'))}"]
        if self._bits_per_byte is not None:
            fields.append(f"bits/byte {_number(self._bits_per_byte)}")
        self._line = self._fit(f"{step}/{total}", [*fields, eta, speed], step / total)
        print("\r\x1b[K" + self._line, end="", file=self._stream, flush=True)

    def _fit(self, head: str, fields: list[str], done: float) -> str:
        """One line of the terminal: head, bar, fields; what is too long goes from the right."""
        room = self._width() - 1  # the last column wraps on some terminals
        while fields and len("  ".join([head, *fields])) + 2 + 6 > room:
            fields.pop()
        text = "  ".join([head, *fields])[:room]
        cells = min(32, room - len(text) - 2)
        if cells < 6:
            return text
        full = round(cells * min(done, 1.0))
        full_bar, rest_bar = self._done_mark * full, self._rest_mark * (cells - full)
        if self._colour:
            full_bar, rest_bar = f"\x1b[36m{full_bar}\x1b[0m", f"\x1b[2m{rest_bar}\x1b[0m"
        return "  ".join([head, full_bar + rest_bar, *fields])

    def _one_line(self, text: str, indent: int) -> str:
        room = max(self._width() - 1 - indent, 16)
        text = text.replace("\n", "⏎")
        return text if len(text) <= room else text[: room - 1] + "…"

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):  # no file, or not a terminal
            return shutil.get_terminal_size().columns


def short_number(value: float | None) -> str:
    """12345 -> 12.3k, with k, M, B and T for powers of a thousand; "-" for None."""
    if value is None:
        return "-"
    for power, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * power:
            return f"{value / power:.3g}{unit}"
    return f"{value:.3g}"


def clock(seconds: float | None) -> str:
    """3723 -> 1:02:03, 90000 -> 1d 01:00:00; "-" for None."""
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}"


def flops_per_step(
    *,
    batch: int,
    seq_len: int,
    n_layers: int,
    d_model: int,
    d_mlp: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    vocab_size: int,
    gated: bool,
) -> float:
    """Floating point operations of one update of a decoder, as Megatron-LM counts them.

    batch: sequences; vocab_size: rows of the embedding, padding included; gated: three matrices in
    the MLP instead of two. Causal attention counts as half; recomputed activations do not count.
    """
    tokens = batch * seq_len
    query, keys_and_values = n_heads * head_dim, 2 * n_kv_heads * head_dim
    mlp = d_model * d_mlp * (3 if gated else 2)
    attention = d_model * (query + keys_and_values) + query * d_model
    weights = n_layers * (mlp + attention) + d_model * vocab_size
    scores = n_layers * seq_len * query  # QK^T and PV, half of each is masked
    return (
        6.0 * tokens * (weights + scores)
    )  # 2 for a multiply-add, forward once and backward twice


# Dense bf16 with float32 accumulation, FLOP/s of one device, by a word of jax's device_kind; the
# first match wins. NVIDIA's data sheets print twice this where they assume sparsity.
PEAK_FLOPS = {
    "GB300": 2500e12,  # GB300 NVL72 data sheet: 360 PFLOP/s sparse over 72 GPUs
    "GB200": 2500e12,  # GB200 NVL72 data sheet: 360 PFLOP/s sparse over 72 GPUs
    "B300": 2250e12,  # HGX B300 data sheet: 36 PFLOP/s sparse over 8 GPUs
    "B200": 2250e12,  # HGX B200 data sheet: 36 PFLOP/s sparse over 8 GPUs
    "GH200": 989e12,  # GH200 data sheet: 1,979 sparse
    "H200 NVL": 835e12,  # H200 data sheet: 1,671 sparse
    "H200": 989e12,  # H200 data sheet, SXM: 1,979 sparse
    "H100 PCIe": 756e12,  # H100 PCIe product brief: 1,513 sparse
    "H100 NVL": 835e12,  # H100 data sheet, NVL: 1,671 sparse
    "H100": 989e12,  # H100 data sheet, SXM: 1,979 sparse
    "A100": 312e12,  # A100 data sheet, SXM and PCIe
    "A40": 150e12,  # A40 data sheet: 149.7
    "A10": 125e12,  # A10 data sheet
    "L40S": 362e12,  # L40S data sheet
    "L40": 181e12,  # L40 data sheet
    "L4": 121e12,  # L4 data sheet: 242 sparse
    "RTX 5090": 209e12,  # RTX Blackwell white paper, appendix A: 209.5
    "RTX 4090": 165e12,  # Ada white paper, appendix A: 165.2
    "RTX 3090": 71e12,  # GA102 white paper, appendix A: 71
    "MI300X": 1307e12,  # AMD Instinct MI300X data sheet: 1,307.4
    "TPU v6 lite": 918e12,  # Google Cloud documentation, TPU v6e
    "TPU v5 lite": 197e12,  # Google Cloud documentation, TPU v5e
    "TPU v5": 459e12,  # Google Cloud documentation, TPU v5p
    "TPU v4": 275e12,  # Google Cloud documentation, TPU v4
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device, from `jax.Device.device_kind`; None if it is not known."""
    for name, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device_kind):  # a whole word: A10 is not A100, nor H200 GH200
            return flops
    return None


def _cut(path: Path, last_step: int) -> None:
    """Rewrites the file without rows after `last_step` and without a torn line, or not at all."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] <= last_step]
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("w", encoding="ascii") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _open_board(folder: Path, resume_step: int) -> "_Board | None":
    try:
        return _Board(folder, resume_step)
    except ImportError:
        log.warning("no curves in %s: tensorboard is not installed", folder)
        return None


class _Board:
    """TensorBoard event files, without TensorFlow.

    Not `tensorboard.summary.Writer`: its scalars are tensors, which `EventAccumulator.Scalars` does
    not list and does not forget after a restart.
    """

    def __init__(self, folder: Path, resume_step: int):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        proto: Any = event_pb2  # makes its classes when it is imported
        self._file, self._event = EventFileWriter(str(folder)), proto.Event
        restart = self._event(step=resume_step + 1, wall_time=time.time())
        restart.session_log.status = proto.SessionLog.START  # forget this step and what is after it
        self._file.add_event(restart)

    def write(self, row: Mapping[str, Any]) -> None:
        event = self._event(step=row["step"], wall_time=row["time"])
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "time"):
                event.summary.value.add(tag=f"{row['kind']}/{name}", simple_value=value)
        self._file.add_event(event)
        self._file.flush()  # or where TensorFlow is installed, a kill would cost 120 s of curves

    def close(self) -> None:
        self._file.close()


def _strict(value: Any) -> Any:
    """The value as strict JSON holds it: plain Python numbers, and null for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # numpy and jax
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"
