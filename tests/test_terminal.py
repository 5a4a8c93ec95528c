import io
import math
import re

import pytest

from mlm_jax.metrics import MetricsLog
from mlm_jax.terminal import Terminal, clock
from mlm_jax.terminal import short_number as short


class FakeTty(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def tty(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    return FakeTty()


def train_row(step, **other):
    row = {"kind": "train", "step": step, "loss": 2.5, "grad_norm": 0.8, "learning_rate": 3e-4}
    row |= {"tokens": 1000 * step, "step_time_s": 0.5, "data_wait_s": 0.0}
    row |= {"tokens_per_s": 12345.0, "tflops_per_device": 41.2, "mfu": None, "memory_gib": None}
    return row | other


def test_a_file_gets_one_plain_line_a_train_row():
    stream = io.StringIO()
    terminal = Terminal(1000, stream)
    terminal.update(train_row(200, mfu=0.417))
    terminal.update({"kind": "eval", "step": 200, "eval_loss": 2.31, "bits_per_byte": 1.98})
    terminal.update(train_row(400, loss=None, step_time_s=150.0))
    terminal.update({"kind": "event", "step": 400, "event": "start"})
    terminal.close()
    first, second, third = stream.getvalue().splitlines()
    assert first == (
        "step 200/1000  loss 2.5  grad norm 0.8  lr 0.0003  "
        "12.3k tok/s  41.2 TFLOP/s  MFU 41.7%  ETA 0:06:40"  # 800 steps of 0.5 s
    )
    assert second == "eval  step 200  loss 2.31  bits/byte 1.98"
    assert third.startswith("step 400/1000  loss nan  ")
    assert third.endswith("ETA 1d 01:00:00")


def test_a_terminal_gets_one_line_that_is_redrawn(tty):
    terminal = Terminal(1000, tty)
    terminal.update(train_row(100))
    terminal.update(train_row(500))
    bars = tty.getvalue().split("\r\x1b[K")[1:]
    assert len(bars) == 2
    assert "\n" not in tty.getvalue()
    head, bar, *fields = bars[1].split("  ")
    assert head == "500/1000"
    assert 0 <= bar.count("━") - bar.count("─") <= 1  # half of it
    assert fields == ["50%", "loss 2.5", "ETA 0:04:10", "12.3k tok/s"]
    terminal.close()
    terminal.close()
    assert tty.getvalue().endswith("12.3k tok/s\n")


def test_lines_above_the_bar_leave_it_whole(tty):
    terminal = Terminal(1000, tty)
    terminal.update(train_row(200))
    bar = tty.getvalue()
    terminal.update({"kind": "eval", "step": 200, "eval_loss": 2.31, "bits_per_byte": 1.98})
    assert tty.getvalue() == bar + "\r\x1b[Keval  step 200  loss 2.31  bits/byte 1.98\n" + bar[4:]
    terminal.update(train_row(201))
    assert "bits/byte 1.98" in tty.getvalue().split("\r\x1b[K")[-1]


@pytest.mark.parametrize(
    ("columns", "fields"), [(20, []), (40, ["loss"]), (60, ["bits/byte"]), (200, ["ETA", "tok/s"])]
)
def test_the_bar_fits_the_terminal(tty, monkeypatch, columns, fields):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal(100_000, tty)
    terminal.update({"kind": "eval", "step": 1, "eval_loss": 2.31, "bits_per_byte": 1.98})
    terminal.update(train_row(12_345))
    bar = tty.getvalue().split("\r\x1b[K")[-1]
    assert len(bar) < columns
    assert bar.startswith("12345/100000")
    assert all(field in bar for field in fields)
    assert ("━" in bar) == (columns > 20)


def test_no_color_is_respected(tty, monkeypatch):
    Terminal(10, tty).update(train_row(5))
    assert "\x1b[" not in tty.getvalue().replace("\x1b[K", "")
    monkeypatch.delenv("NO_COLOR")
    coloured = FakeTty()
    Terminal(10, coloured).update(train_row(5))
    assert re.sub(r"\x1b\[\d+m", "", coloured.getvalue()) == tty.getvalue() != coloured.getvalue()


def test_a_dumb_terminal_gets_plain_lines(tty, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    Terminal(10, tty).update(train_row(5))
    assert tty.getvalue().startswith("step 5/10")


def test_a_sample_is_two_lines_and_cannot_move_the_cursor(tty):
    text = "\x1b[2J\r\x07" + "x\n" * 100 + "\udc80"
    row = {"kind": "event", "event": "sample", "step": 9, "prompt": "def f():\n", "text": text}
    Terminal(10, tty).update(row)
    shown = tty.getvalue().removeprefix("\r\x1b[K")
    first, second = shown.splitlines()
    assert first == "sample  step 9  def f():⏎"
    assert re.fullmatch(r" {16}·\[2J··(x⏎)+x?…", second)
    assert len(second) < 80
    assert "\x1b" not in shown


def test_a_terminal_that_knows_ascii_only():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # strict
    terminal = Terminal(10, stream)
    terminal.say("⏎ \udc80")
    assert stream.buffer.getvalue() == rb"\u23ce \udc80" + b"\n"


def test_rows_reach_the_terminal_and_close_leaves_its_line(tty, tmp_path):
    with MetricsLog(tmp_path, terminal=Terminal(10, tty)) as log:
        log.write("train", 5, loss=math.nan)
    assert "loss nan" in tty.getvalue()
    assert tty.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (7.25, "7.25"), (999.7, "1k"), (12345, "12.3k"), (1e6, "1M")],
)
def test_short_numbers(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0.4, "0:00:00"), (3723, "1:02:03"), (90000, "1d 01:00:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
