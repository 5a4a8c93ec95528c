import io
import json
import math
import re

import numpy as np
import pytest

from mlm_jax.errors import CheckpointError
from mlm_jax.metrics import MetricsLog, Terminal, clock, flops_per_step, peak_flops, read_rows
from mlm_jax.metrics import short_number as short


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


def write_steps(workdir, steps, **how):
    with MetricsLog(workdir, **how) as log:
        for step in steps:
            log.write("train", step, loss=float(step))


def test_a_row_is_one_line_of_strict_json_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.write("train", np.int64(3), loss=np.float32(1.5), tokens=np.int32(7), mfu=None)
    log.write(
        "event", 3, event="sample", text="a\nb ⏎ \udc80", scores=[1, math.inf, {"x": math.nan}]
    )
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()  # before close
    log.close()

    def refuse(word):
        pytest.fail(f"{word} is not strict JSON")

    train, event = (json.loads(line, parse_constant=refuse) for line in lines)
    assert train.pop("time") > 1.6e9
    assert train == {"kind": "train", "step": 3, "loss": 1.5, "tokens": 7, "mfu": None}
    assert event["text"] == "a\nb ⏎ \udc80"
    assert event["scores"] == [1, None, {"x": None}]


@pytest.mark.parametrize("value", [math.nan, np.float32("nan"), -np.inf, np.array(math.inf)])
def test_what_is_not_finite_becomes_null(tmp_path, value):
    with MetricsLog(tmp_path) as log:
        log.write("train", 1, loss=value)
    assert read_rows(tmp_path / "metrics.jsonl")[0]["loss"] is None


def test_an_unknown_kind_of_row_is_refused(tmp_path):
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="train, eval, event"):
        log.write("trian", 1, loss=1.0)
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_resume_cuts_what_came_after_it(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (10, 20, 30):
            log.write("train", step, loss=1.0)
            log.write("eval", step, eval_loss=1.0)
            log.write("event", step, event="sample", prompt="a", text="b")
    write_steps(tmp_path, [30], resume_step=20)
    rows = read_rows(tmp_path / "metrics.jsonl")
    kinds = ["train", "eval", "event"]
    assert [(row["kind"], row["step"]) for row in rows] == [
        *((kind, 10) for kind in kinds),
        *((kind, 20) for kind in kinds),
        ("train", 30),
    ]
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"]


def test_a_line_torn_by_a_kill_is_dropped_and_never_glued_to_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, [1, 2])
    with path.open("ab") as file:
        file.write(b'{"kind": "train", "step": 3, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    write_steps(tmp_path, [3], resume_step=2)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}')
    write_steps(tmp_path, [2], resume_step=1)
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_rows(path)


def test_no_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []


def read_board(workdir):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(workdir / "tensorboard"))
    board.Reload()
    tags = board.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}


def test_tensorboard_reads_train_and_eval_rows(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write("train", 1, loss=2.5, mfu=None, note="text")
        log.write("train", 2, loss=math.nan, mfu=0.5)
        log.write("eval", 2, eval_loss=2.25)
        log.write("event", 2, event="baselines", xz=1.9)
    assert read_board(tmp_path) == {
        "train/loss": [(1, 2.5)],
        "train/mfu": [(2, 0.5)],
        "eval/eval_loss": [(2, 2.25)],
    }


def test_a_killed_run_keeps_its_curves(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(200):
        log.write("train", step, loss=2.5)
    assert len(read_board(tmp_path)["train/loss"]) == 200  # not closed
    log.close()


def test_tensorboard_forgets_what_a_resume_undid(tmp_path):
    write_steps(tmp_path, [10, 20, 30])
    with MetricsLog(tmp_path, resume_step=20) as log:
        log.write("train", 25, loss=0.5)
    assert read_board(tmp_path) == {"train/loss": [(10, 10.0), (20, 20.0), (25, 0.5)]}


def test_a_file_gets_one_plain_line_a_train_row():
    stream = io.StringIO()
    terminal = Terminal(1000, stream)
    terminal.update(train_row(200, mfu=0.417))
    terminal.update({"kind": "eval", "step": 200, "eval_loss": 2.31, "bits_per_byte": 1.98})
    terminal.update(train_row(400, loss=None, eta_s=90_000))
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


@pytest.mark.parametrize(("B", "s", "L", "h", "V"), [(8, 1024, 24, 1024, 50304), (1, 1, 1, 12, 5)])
def test_flops_of_a_gpt_are_the_closed_form(B, s, L, h, V):
    flops = flops_per_step(
        batch=B,
        seq_len=s,
        n_layers=L,
        d_model=h,
        d_mlp=4 * h,
        n_heads=4,
        n_kv_heads=4,
        head_dim=h // 4,
        vocab_size=V,
        gated=False,
    )
    assert flops == pytest.approx(72 * B * s * L * h**2 * (1 + s / (12 * h) + V / (12 * h * L)))


def test_flops_count_every_matrix_of_a_llama_six_times():
    D, F, N, K, H, V, L, T = 64, 160, 8, 2, 16, 256, 3, 32
    weights = L * (3 * D * F + 2 * D * N * H + 2 * D * K * H) + D * V
    pairs = T * T / 2  # a query and a key that it may see, on average
    scores = L * 2 * pairs * N * H
    flops = flops_per_step(
        batch=5,
        seq_len=T,
        n_layers=L,
        d_model=D,
        d_mlp=F,
        n_heads=N,
        n_kv_heads=K,
        head_dim=H,
        vocab_size=V,
        gated=True,
    )
    assert flops == pytest.approx(6 * 5 * (T * weights + scores))


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("TPU v5 lite", 197),
        ("cpu", None),
    ],
)
def test_peaks_by_device_kind(kind, tflops):
    assert peak_flops(kind) == (tflops and tflops * 1e12)
