"""Windows a second of random reading beside what eight H100s need, and what indices cost.

python benchmarks/reading.py [--gigabytes 4] [--tokens 1e9 1e10] [--samples 1e8]

windows: a file of that size, of random tokens, is read at random in windows of seq_len 4096, first
cold (the kernel is asked to drop what it keeps of the file), then warm. indexing: seconds and peak
memory of a process that does nothing else, for a corpus of 1,000 tokens a document at seq_len 2048,
and for a blend of 8 datasets.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlm_jax.config import ModelConfig
from mlm_jax.data.blend_order import blend_index, normalised
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.indexed_writer import IndexedWriter
from mlm_jax.data.sampling import GptSamples, build_index
from mlm_jax.metrics import PEAK_FLOPS, flops_per_step

SEQ_LEN, DOCUMENT = 4096, 1_000_000
LLAMA_8B = ModelConfig(
    n_layers=32, d_model=4096, d_mlp=14336, n_heads=32, n_kv_heads=8, vocab_size=128256,
    activation="swiglu", seq_len=SEQ_LEN,
)  # fmt: skip
MFU, DEVICES = 0.5, 8


def windows(gigabytes: float = 4.0) -> None:
    """Prints windows/s of random reading, cold and warm, beside the need of training."""
    flops = flops_per_step(LLAMA_8B, 1) / SEQ_LEN
    need = DEVICES * MFU * PEAK_FLOPS["H100"] / flops / SEQ_LEN
    print(
        f"need: {DEVICES} H100s x {MFU:.0%} of {PEAK_FLOPS['H100'] / 1e12:.0f} TFLOP/s"
        f" / {flops:.3g} FLOPs a token of Llama 8B / {SEQ_LEN} tokens = {need:.1f} windows/s"
    )
    with tempfile.TemporaryDirectory() as folder:
        prefix, rng = Path(folder) / "random", np.random.default_rng(0)
        with IndexedWriter(prefix, np.uint16) as writer:
            for _ in range(int(gigabytes * 1e9 / 2 / DOCUMENT)):
                writer.add_document([rng.integers(0, 65536, DOCUMENT, np.uint16)])
        indexed = IndexedDataset(prefix)
        samples = GptSamples(
            indexed, range(len(indexed)), n_samples=None, seq_len=SEQ_LEN, seed=1234
        )
        with open(f"{prefix}.bin", "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.path.getsize(f"{prefix}.bin") / 1e9
        count = min(len(samples), 20_000)
        for state in ("cold", "warm"):  # the same windows twice
            begun = time.perf_counter()
            for i in range(count):
                samples[i]
            rate = count / (time.perf_counter() - begun)
            print(
                f"{state}, {size:.1f} GB: {rate:,.0f} windows/s, {rate / need:,.0f} times the need"
            )


def indexing(tokens: tuple[float, ...] = (1e9, 1e10), samples: float = 1e8) -> None:
    """Prints seconds and peak memory of an index of so many tokens, and of a blend."""
    for count in map(int, tokens):
        measured(f"index of {count:.0e} tokens", index_of, count)
    measured(f"blend of {int(samples):.0e} samples from 8", blend_of, int(samples))


def index_of(tokens: int) -> float:
    lengths = np.random.default_rng(0).multinomial(tokens, np.full(tokens // 1000, 1000 / tokens))
    lengths = lengths.astype(np.int32)
    begun = time.perf_counter()
    build_index(lengths, range(len(lengths)), n_samples=None, seq_len=2048, seed=1234)
    return time.perf_counter() - begun


def blend_of(samples: int) -> float:
    weights = normalised(np.random.default_rng(0).random(8).tolist())
    begun = time.perf_counter()
    blend_index(weights, samples)
    return time.perf_counter() - begun


def measured(name: str, work: Callable[[int], float], size: int) -> None:
    """In a process of its own, so that the peak is that of the work and of the imports."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        before, seconds, after = pool.apply(seconds_and_memory, (work, size))
    print(f"{name}: {seconds:.2f} s, peak memory {after:.2f} GB, of it imports {before:.2f} GB")


def seconds_and_memory(work: Callable[[int], float], size: int) -> tuple[float, float, float]:
    before = peak_memory()
    seconds = work(size)
    return before, seconds, peak_memory()


def peak_memory() -> float:
    """GB. Not from resource.getrusage, where a process begins with the peak of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e9, 1e10])
    parser.add_argument("--samples", type=float, default=1e8)
    args = parser.parse_args()
    windows(args.gigabytes)
    indexing(tuple(args.tokens), args.samples)


if __name__ == "__main__":
    main()
