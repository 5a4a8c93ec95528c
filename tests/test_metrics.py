import json
import math

import numpy as np
import pytest

from mlm_jax.config import ModelConfig
from mlm_jax.errors import CheckpointError
from mlm_jax.metrics import MetricsLog, flops_per_step, peak_flops, read_rows


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


@pytest.mark.parametrize(
    ("B", "s", "L", "h", "V"), [(8, 1024, 24, 1024, 50304), (1, 2, 1, 12, 128)]
)
def test_flops_of_a_gpt_are_the_closed_form(B, s, L, h, V):
    cfg = ModelConfig(n_layers=L, d_model=h, n_heads=4, vocab_size=V, seq_len=s)
    expected = 72 * B * s * L * h**2 * (1 + s / (12 * h) + V / (12 * h * L))
    assert flops_per_step(cfg, B) == pytest.approx(expected)


def test_flops_count_every_matrix_of_a_llama_six_times():
    D, F, N, K, H, V, L, T = 64, 160, 8, 2, 16, 256, 3, 32
    cfg = ModelConfig(
        n_layers=L, d_model=D, n_heads=N, n_kv_heads=K, head_dim=H, d_mlp=F, vocab_size=V,
        seq_len=T, activation="swiglu",
    )  # fmt: skip
    weights = L * (3 * D * F + 2 * D * N * H + 2 * D * K * H) + D * V
    pairs = T * T / 2  # a query and a key that it may see, on average
    scores = L * 2 * pairs * N * H
    assert flops_per_step(cfg, 5) == pytest.approx(6 * 5 * (T * weights + scores))


def test_flops_of_a_bert_count_all_pairs_of_tokens_and_its_head():
    B, s, L, h, V = 3, 128, 2, 64, 512
    cfg = ModelConfig("bert", n_layers=L, d_model=h, n_heads=4, vocab_size=V, seq_len=s)
    expected = 72 * B * s * L * h**2 * (1 + s / (6 * h) + (V + h) / (12 * h * L))
    assert flops_per_step(cfg, B) == pytest.approx(expected)


def test_flops_of_a_t5_count_what_each_side_reads():
    B, s, t, E, L, h, V = 3, 128, 32, 2, 5, 64, 512
    cfg = ModelConfig(
        "t5", n_layers=E, n_decoder_layers=L, d_model=h, n_heads=4, vocab_size=V, seq_len=s,
        target_len=t,
    )  # fmt: skip
    encoder = 72 * B * s * E * h**2 * (1 + s / (6 * h))
    decoder = 72 * B * t * L * h**2 * (1 + t / (12 * h) + V / (12 * h * L))
    cross = 12 * B * L * h * (t * h + s * h + t * s)
    assert flops_per_step(cfg, B) == pytest.approx(encoder + decoder + cross)


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
