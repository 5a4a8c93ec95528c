"""Import and export of Hugging Face checkpoints: GB/s and host memory, beside transformers.

python benchmarks/convert.py [--size 1.2b] [--folder DIR]
pip install torch==2.13.0 transformers     makes the checkpoint, and is the peer

A GPT-2 of that size with random weights in float32 is saved by transformers in shards of 2 GB. Each
job is a process of its own, which has imported what it needs before the clock starts. Memory is
what the process holds beyond that at its peak, without the pages of mapped files (RssAnon).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

SIZES = {"124m": (12, 768, 12), "1.2b": (40, 1536, 32)}
SHARD = "2GB"


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line)


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of work(), and bytes held beyond those before it, looked at every 5 ms."""
    before, most, ended = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            most[0] = max(most[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - begun
    ended.set()
    watcher.join()
    del kept
    return {"seconds": seconds, "bytes": max(most[0] - before, 0)}


def make(folder: Path, size: str) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    layers, width, heads = SIZES[size]
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, n_positions=1024, vocab_size=50257
    )
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder / "hf", max_shard_size=SHARD)


def transformers_load(folder: Path) -> dict[str, float]:
    import torch
    import transformers

    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1))
    load = transformers.AutoModelForCausalLM.from_pretrained

    def read() -> object:
        """It maps the files: what they say is read when it is asked for."""
        model = load(folder / "hf", dtype=torch.float32)
        return model, [weight.sum() for weight in model.parameters()]

    return measured(read)


def transformers_save(folder: Path) -> dict[str, float]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    for weight in model.parameters():
        weight.data = weight.data.clone()  # none may lie in a mapped file
    return measured(lambda: model.save_pretrained(folder / "theirs", max_shard_size=SHARD))


def from_hf(folder: Path) -> dict[str, float]:
    import jax

    import mlm_jax

    jax.block_until_ready(jax.numpy.zeros(8))
    load = mlm_jax.from_hf
    return measured(lambda: jax.block_until_ready(load(folder / "hf")))


def to_hf(folder: Path) -> dict[str, float]:
    import jax

    import mlm_jax

    model = jax.block_until_ready(mlm_jax.from_hf(folder / "hf"))
    save = mlm_jax.to_hf
    return measured(lambda: save(model, folder / "ours"))


def to_workdir(folder: Path) -> dict[str, float]:
    from mlm_jax.__main__ import main

    words = ["convert", "from-hf", str(folder / "hf"), "--workdir", str(folder / "workdir")]
    import mlm_jax.checkpoint.convert
    import mlm_jax.checkpoint.hf  # noqa: F401

    return measured(lambda: main(words))


JOBS = {
    "transformers: from_pretrained": transformers_load,
    "mlm_jax.from_hf": from_hf,
    "convert from-hf, to a workdir": to_workdir,
    "transformers: save_pretrained": transformers_save,
    "mlm_jax.to_hf": to_hf,
}


def job(name: str, folder: Path) -> dict[str, float]:
    for written in ("workdir", "theirs", "ours"):
        shutil.rmtree(folder / written, ignore_errors=True)
    words = [sys.executable, __file__, "--job", name, "--folder", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1.2b")
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--rounds", type=int, default=2, help="the best counts")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(JOBS[args.job](args.folder)))
        return
    with tempfile.TemporaryDirectory() as own:
        folder = args.folder or Path(own)
        if not (folder / "hf").exists():
            make(folder, args.size)
        size = sum(f.stat().st_size for f in (folder / "hf").glob("*.safetensors"))
        print(f"gpt2:{args.size}, {size / 1e9:.2f} GB of float32\n")
        print(
            "job                               seconds   GB/s   memory beyond before, of the file"
        )
        for name in JOBS:
            rounds = [job(name, folder) for _ in range(args.rounds)]
            seconds = min(r["seconds"] for r in rounds)
            held = min(r["bytes"] for r in rounds)
            told = f"{held / 1e9:.2f} GB, {held / size:.2f}x"
            print(f"{name:32} {seconds:8.2f} {size / 1e9 / seconds:6.2f}   {told}", flush=True)


if __name__ == "__main__":
    main()
