"""What a run tells, row by row in metrics.jsonl; and how much work a step is."""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from mlm_jax.boards import Board, open_tensorboard
from mlm_jax.config import ModelConfig
from mlm_jax.errors import CheckpointError
from mlm_jax.terminal import Terminal

KINDS = ("train", "eval", "event")


class MetricsLog:
    """Appends rows to `workdir/metrics.jsonl`; boards and the terminal see the same rows.

    A row is a JSON object on a line: kind, step (updates done), time (Unix seconds), its values.
    What a killed run wrote after `resume_step` is cut first, in the file and in TensorBoard.
    `boards` are shown the rows beside TensorBoard, and closed with this.
    One process of a run writes; the others have a NoMetricsLog.
    """

    def __init__(
        self, workdir: Path, *, resume_step: int = 0, terminal: Terminal | None = None,
        boards: Sequence[Board] = (),
    ):  # fmt: skip
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        _cut(path, resume_step)
        self._file = path.open("a", encoding="ascii")
        self._boards = [*open_tensorboard(workdir / "tensorboard", resume_step), *boards]
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
        for board in self._boards if kind != "event" else ():
            board.write(row)
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
        for board in self._boards:
            board.close()
        if self._terminal:
            self._terminal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoMetricsLog(contextlib.AbstractContextManager):
    """Of the other processes of a run, which say the same and are not heard."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        pass

    def names(self, step: int) -> set[str]:
        return set()

    def __exit__(self, *_: object) -> None:
        pass


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


def flops_per_step(m: ModelConfig, sequences: int) -> float:
    """Floating point operations of one update of so many sequences, as Megatron-LM counts them.

    Six for each weight of a matrix and token that meets it: a multiply-add, forward once and
    backward twice. Rows that pad the vocabulary count, causal attention counts as half, a window as
    if there were none; recomputed activations do not, nor what BERT computes of one token a text.

    With d_mlp = 4 h, n_heads * head_dim = h, no gate, B sequences of s tokens and V rows:
    GPT    72 B s L h^2 (1 + s / (12 h) + V / (12 h L))
    BERT   72 B s L h^2 (1 + s / (6 h) + (V + h) / (12 h L)): all pairs of tokens, and its head
    T5     72 B s L h^2 (1 + s / (6 h)) + 72 B t L' h^2 (1 + t / (12 h) + V / (12 h L'))
           + 12 B L' h (t h + s h + t s): t tokens and L' layers of the decoder, and in each of
           these, queries and outputs, keys and values of the encoder's tokens, and scores
    """
    query, keys_and_values = m.n_heads * m.head_dim, 2 * m.n_kv_heads * m.head_dim
    mlp = m.d_model * m.d_mlp * (3 if m.gated else 2)
    layer = mlp + m.d_model * (query + keys_and_values) + query * m.d_model
    head = m.d_model * m.padded_vocab + m.d_model**2 * (m.family == "bert" and m.mlm_head)

    def stack(layers: int, tokens: int, *, causal: bool) -> int:
        """Of a sequence of so many tokens: QK^T and PV are of all pairs, or of half of them."""
        return layers * tokens * (layer + tokens * query * (1 if causal else 2))

    work = stack(m.n_layers, m.seq_len, causal=m.causal and not m.seq2seq)
    if m.seq2seq:
        work += stack(m.n_decoder_layers, m.target_len, causal=True)
        of_one = m.target_len * 2 * m.d_model * query + m.seq_len * m.d_model * keys_and_values
        work += m.n_decoder_layers * (of_one + 2 * m.target_len * m.seq_len * query)
    return 6.0 * sequences * (work + m.target_len * head)


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


def _strict(value: Any) -> Any:
    """The value as strict JSON holds it: plain Python numbers, and null for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # numpy and jax
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
