"""A run as a person sees it on a terminal, or in a log file."""

import os
import re
import shutil
import sys
from collections.abc import Mapping
from typing import Any, TextIO


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
        self._line, self._compiled = "", 0

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
            step, size, self._compiled = row["step"], row.get("batch_size"), self._compiled + 1
            parameters = f"{short_number(row['parameters'])} parameters"
            begin = f"resuming at step {step}: " if step and self._compiled == 1 else ""
            if self._compiled > 1:
                begin = f"from step {step + 1} on batches have {size} sequences: "
            under = f" under {row['layout']}" if "=" in row.get("layout", "") else ""
            self.say(f"{begin}compiling a step of {parameters}{under}")
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
            self._line, self._compiled = "", 0

    def _show_step(self, row: Mapping[str, Any]) -> None:
        step, total = row["step"], max(self._total, 1)
        speed = f"{short_number(row.get('tokens_per_s'))} tok/s"
        each = row.get("step_time_s")
        left = None if each is None else max(total - step, 0) * each
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


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"
