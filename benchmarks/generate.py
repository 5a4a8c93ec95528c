"""Our generation against transformers.generate: the same GPT-2 shape, greedy, in one run.

python benchmarks/generate.py [--shapes small gpt-124m] [--batch 1 8] [--rounds 7]
pip install torch==2.13.0 transformers     the peer; without it only ours is measured

Prompts of 64 tokens, 128 new ones; a turn is one call, ids in and ids out. Both keep a cache.
"""

import argparse
import time
from itertools import product

from contest import hold, on_gpu, print_ratios, serve

SHAPES = {
    "small": {"n_layers": 6, "d_model": 384, "n_heads": 6, "seq_len": 256, "vocab_size": 50257},
    "gpt-124m": {
        "n_layers": 12,
        "d_model": 768,
        "n_heads": 12,
        "seq_len": 1024,
        "vocab_size": 50257,
    },
}
PROMPT, NEW = 64, 128


class Ours:
    def __init__(self, shape: dict, batch: int, gpu: bool):
        from mlm_jax.host import keep_freed_memory

        keep_freed_memory()
        import jax
        import numpy as np

        from mlm_jax.config import ModelConfig
        from mlm_jax.inference.engine import generate_ids
        from mlm_jax.inference.sampling import Sampling
        from mlm_jax.layout import Layout
        from mlm_jax.models import build

        cfg = ModelConfig(**shape, dtype="bfloat16" if gpu else "float32")
        model = build(cfg, Layout.create(jax.devices()[:1]))
        prompts = np.random.default_rng(0).integers(0, 50257, (batch, PROMPT)).tolist()
        self.generate = lambda: generate_ids(
            model, prompts, max_tokens=NEW, sampling=Sampling(temperature=0)
        )
        begun = time.perf_counter()
        self.run(1)
        self.facts = {
            "compile_s": time.perf_counter() - begun, "version": f"jax {jax.__version__}",
            "device": jax.devices()[0].device_kind,
        }  # fmt: skip

    def run(self, amount: int) -> float:
        for _ in range(amount):
            new = self.generate()
        return sum(map(len, new))

    def memory_gib(self) -> None:
        return None


class Transformers:
    def __init__(self, shape: dict, batch: int, gpu: bool):
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            n_layer=shape["n_layers"], n_embd=shape["d_model"], n_head=shape["n_heads"],
            n_positions=shape["seq_len"], vocab_size=shape["vocab_size"],
        )  # fmt: skip
        model = GPT2LMHeadModel(config).eval()
        if gpu:
            model = model.to("cuda", torch.bfloat16)
        ids = torch.randint(0, 50257, (batch, PROMPT), device=model.device)
        self.generate = torch.inference_mode()(lambda: model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=NEW,
            max_new_tokens=NEW, pad_token_id=0,
        ))  # fmt: skip
        begun = time.perf_counter()
        self.run(1)
        self.facts = {
            "compile_s": time.perf_counter() - begun, "version": f"torch {torch.__version__}",
            "device": str(model.device),
        }  # fmt: skip

    def run(self, amount: int) -> float:
        for _ in range(amount):
            new = self.generate()
        return new[:, PROMPT:].numel()

    def memory_gib(self) -> None:
        return None


CONTESTANTS = {"mlm_jax": Ours, "transformers": Transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        import jax

        gpu = jax.default_backend() != "cpu"
        return serve(CONTESTANTS[args.contestant](SHAPES[args.shapes[0]], args.batch[0], gpu))
    gpu = on_gpu()
    for shape, batch in product(args.shapes, args.batch):
        print(f"\n{shape}, batch {batch}: {SHAPES[shape]}", flush=True)
        options = ["--shapes", shape, "--batch", str(batch)]
        field = hold(list(CONTESTANTS), options, args.rounds, 1, together=not gpu)
        for one in field:
            speed = one.rows[-1]["result"] / one.median("wall_s")
            first = one.facts["compile_s"]
            row = f"  {one.name:14}{speed:8.1f} tokens/s, first call {first:.1f} s"
            print(f"{row}, {one.facts['version']} on {one.facts['device']}")
        print_ratios(field, [one for one in field if one.name == "transformers"])


if __name__ == "__main__":
    main()
