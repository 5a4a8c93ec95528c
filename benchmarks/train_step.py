"""Our train step against Hugging Face's GPT-2 in PyTorch: same shape, same machine, one run.

python benchmarks/train_step.py [--shapes small small-50k] [--rounds 7] [--steps 4]
pip install torch==2.13.0 transformers     the peers; without them only our step is measured

Each contestant is a process of its own: it compiles, warms up, and then waits for its turn. On a
CPU turns go round, so that a busy machine slows all alike, and ratios are medians over the rounds;
on a GPU one contestant is measured after the other. All train with AdamW and clipping,
dropout 0, one document a row.
"""

import argparse
import os
import subprocess
import sys
import time
from typing import Any

from contest import hold, on_gpu, print_ratios, serve

Shape = dict[str, Any]
CPU = {"n_layers": 6, "d_model": 384, "n_heads": 6, "seq_len": 256, "batch": 8, "dtype": "float32"}
GPU = {"seq_len": 1024, "dtype": "bfloat16", "vocab_size": 50304}
LLAMA = {
    "norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False, "tied": False,
}  # fmt: skip
SHAPES: dict[str, Shape] = {
    "small": CPU | {"vocab_size": 1024},
    "small-50k": CPU | {"vocab_size": 50304},
    "gpt-124m": GPU | {"n_layers": 12, "d_model": 768, "n_heads": 12, "batch": 32},
    "gpt-1.2b": GPU | {"n_layers": 40, "d_model": 1536, "n_heads": 16, "batch": 16},
    "llama-8b-layers": GPU | LLAMA | {  # as many layers of Llama 3 8B as leave room for Adam
        "n_layers": 6, "d_model": 4096, "n_heads": 32, "n_kv_heads": 8, "d_mlp": 14336,
        "seq_len": 4096, "batch": 2, "vocab_size": 128256, "tied": False,
    },
}  # fmt: skip
PEAK = 989e12  # bf16, dense; also of the H100 SXM


class Ours:
    """mlm_jax.step, as the loop runs it."""

    def __init__(self, shape: Shape, remat: str, xla: str = "default"):
        from mlm_jax.host import keep_freed_memory, set_xla_flags

        keep_freed_memory()
        set_xla_flags(xla)
        import jax
        import numpy as np

        from mlm_jax.door import from_dict
        from mlm_jax.layout import Layout
        from mlm_jax.step import make_steps

        model = {k: v for k, v in shape.items() if k != "batch"}
        B, T, V = shape["batch"], shape["seq_len"], shape["vocab_size"]
        run = from_dict({
            "model": model, "optimizer": {"schedule": "constant", "lr": 1e-4},
            "train": {"global_batch_size": B, "remat": remat},
        })  # fmt: skip
        layout = Layout.create(jax.devices()[:1]).fit(run.model, batch=B)
        steps = make_steps(run, layout)
        ids = np.random.default_rng(0).integers(0, V, (B, T + 1), dtype=np.int32)
        weights = np.ones((B, T), np.float32)
        batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}
        self.batch = jax.device_put(batch, layout.sharding("batch", None))
        self.state, self.jax = steps.init(), jax
        begun = time.perf_counter()
        self.step = steps.train.lower(self.state, self.batch).compile()
        memory = self.step.memory_analysis()
        self.facts = {
            "compile_s": time.perf_counter() - begun,
            "temporary_gib": memory.temp_size_in_bytes / 2**30,
            "version": f"jax {jax.__version__}", "device": jax.devices()[0].device_kind,
        }  # fmt: skip

    def run(self, steps: int) -> float:
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        return float(self.jax.device_get(metrics["loss"]))

    def memory_gib(self) -> float | None:
        stats = self.jax.devices()[0].memory_stats() or {}
        return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


class Torch:
    """transformers' GPT2LMHeadModel or LlamaForCausalLM with its scaled-dot-product attention."""

    def __init__(self, shape: Shape, compiled: bool):
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

        self.torch = torch
        self.cuda = torch.cuda.is_available()
        device = "cuda" if self.cuda else "cpu"
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        common = {"vocab_size": shape["vocab_size"], "use_cache": False}
        if shape.get("norm") == "rmsnorm":
            model = LlamaForCausalLM(LlamaConfig(
                hidden_size=shape["d_model"], intermediate_size=shape["d_mlp"],
                num_hidden_layers=shape["n_layers"], num_attention_heads=shape["n_heads"],
                num_key_value_heads=shape["n_kv_heads"], **common,
            ))  # fmt: skip
        else:
            model = GPT2LMHeadModel(GPT2Config(
                n_layer=shape["n_layers"], n_embd=shape["d_model"], n_head=shape["n_heads"],
                n_positions=shape["seq_len"], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **common,
            ))  # fmt: skip
        self.model = model.to(device).train()
        self.bf16 = shape["dtype"] == "bfloat16"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        B, T, V = shape["batch"], shape["seq_len"], shape["vocab_size"]
        self.ids = torch.randint(0, V, (B, T), device=device)
        self.forward = torch.compile(self.model) if compiled else self.model
        begun = time.perf_counter()
        self.run(1)
        self.facts = {
            "compile_s": time.perf_counter() - begun, "version": f"torch {torch.__version__}",
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
        }  # fmt: skip

    def run(self, steps: int) -> float:
        torch = self.torch
        for _ in range(steps):
            with torch.autocast(self.ids.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.forward(input_ids=self.ids, labels=self.ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def memory_gib(self) -> float | None:
        return self.torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None


CONTESTANTS = {
    "mlm_jax": lambda shape: Ours(shape, "none"),
    "mlm_jax, selective remat": lambda shape: Ours(shape, "selective"),
    "mlm_jax, overlap": lambda shape: Ours(shape, "none", xla="overlap"),
    "torch eager": lambda shape: Torch(shape, compiled=False),
    "torch.compile": lambda shape: Torch(shape, compiled=True),
}


def flops(shape: Shape) -> float:
    from mlm_jax.config import ModelConfig
    from mlm_jax.metrics import flops_per_step

    nouns = {key: value for key, value in shape.items() if key != "batch"}
    return flops_per_step(ModelConfig(**nouns), shape["batch"])


def matrix_product_flops() -> float:
    """FLOP/s of a large bf16 product on this GPU: what a step could reach at best."""
    import jax
    import jax.numpy as jnp

    n = 8192
    a = jnp.ones((n, n), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    product(a, a).block_until_ready()
    begun = time.perf_counter()
    for _ in range(50):
        b = product(a, a)
    b.block_until_ready()
    return 50 * 2 * n**3 / (time.perf_counter() - begun)


def compare(shape: str, names: list[str], rounds: int, steps: int, gpu: bool) -> None:
    dims = SHAPES[shape]
    print(f"\n{shape}: {dims}", flush=True)
    field = hold(names, ["--shapes", shape], rounds, steps, together=not gpu)
    tokens = dims["batch"] * dims["seq_len"]
    columns = "tokens/s  ms/step  CPU s/step  compile s   GiB"
    print(f"  {'':26}{columns}{'  TFLOP/s  MFU' if gpu else ''}")
    for one in field:
        step, facts = one.median("wall_s"), one.facts
        row = f"  {one.name:26}{tokens / step:8,.0f} {step * 1e3:8.0f} {one.median('cpu_s'):11.2f}"
        row += f" {facts['compile_s']:10.1f} {max(r['memory_gib'] for r in one.rows):5.1f}"
        if gpu:
            row += f" {flops(dims) / step / 1e12:8.0f} {flops(dims) / step / PEAK:4.0%}"
        print(f"{row}   {facts['version']} on {facts['device']}, loss {one.rows[-1]['result']:.3f}")
    print_ratios(field, [one for one in field if one.name.startswith("torch")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help=" ".join(SHAPES))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        entry = CONTESTANTS[args.contestant](SHAPES[args.shapes[0]])
        entry.run(2)
        return serve(entry)
    gpu = on_gpu()
    if gpu:
        code = "import train_step; print(train_step.matrix_product_flops())"
        here = os.path.dirname(os.path.abspath(__file__))
        found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=here)
        print(f"a product of 8192 x 8192 bf16 matrices: {float(found.stdout) / 1e12:.0f} TFLOP/s")
    names = args.contestants or [n for n in CONTESTANTS if gpu or "overlap" not in n]
    default = ["gpt-124m", "gpt-1.2b", "llama-8b-layers"] if gpu else ["small", "small-50k"]
    for shape in args.shapes or default:
        compare(shape, names, args.rounds, args.steps, gpu)


if __name__ == "__main__":
    main()
