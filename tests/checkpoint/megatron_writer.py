"""Checkpoints that megatron-core itself writes, on CPUs, and the logits of its own forward pass.

    python tests/checkpoint/megatron_writer.py RANK TP STYLE FOLDER [PORT]

one process a rank. FOLDER/torch_dist/iter_0000003 and FOLDER/legacy/iter_0000003 are what Megatron
has under --save, FOLDER/logits.npy float32 [B, T, V] of tokens.npy, without the padding.
"""

import argparse
import contextlib
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

torch.cuda.current_device = lambda: "cpu"  # of which core asks without need
torch.cuda.synchronize = lambda *_: None

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

SIZES = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 128,
    "kv_channels": 8,
}  # fmt: skip
COMMON = {
    "seq_length": 32, "max_position_embeddings": 32, "vocab_size": 250, "norm_epsilon": 1e-5,
    "make_vocab_size_divisible_by": 128, "group_query_attention": False, "num_query_groups": 1,
    "normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True, "rotary_percent": 1.0,
    "position_embedding_type": "learned_absolute", "rotary_base": 10000, "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": False, "bias_gelu_fusion": False, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "apply_layernorm_1p": False, "num_experts": None,
    "qk_layernorm": False,
    "use_rope_scaling": False, "rope_scaling_factor": 8.0, "encoder_num_layers": 2, "bf16": False,
    "attention_backend": AttnBackend.unfused, "tokenizer_type": "GPTSentencePieceTokenizer",
    "iteration": 3, "data_path": ["a", "b"], "params_dtype": torch.float32,
}  # fmt: skip
LLAMA = {
    "normalization": "RMSNorm", "swiglu": True, "ffn_hidden_size": 64, "add_bias_linear": False,
    "position_embedding_type": "rope", "untie_embeddings_and_output_weights": True,
    "group_query_attention": True, "num_query_groups": 2, "norm_epsilon": 1e-6,
}  # fmt: skip
STYLES = {
    "gpt2": {},
    "llama": LLAMA,
    "nouns": {
        **LLAMA, "normalization": "LayerNorm", "swiglu": False, "ffn_hidden_size": 128,
        "add_qkv_bias": True, "qk_layernorm": True,
        "rotary_percent": 0.5, "kv_channels": 16, "untie_embeddings_and_output_weights": False,
        "use_rope_scaling": True, "rotary_base": 1000,
    },
}  # fmt: skip


@contextlib.contextmanager
def no_fork(*_):
    yield


CudaRNGStatesTracker.fork = no_fork  # nothing is dropped


def main(rank: int, tp: int, style: str, folder: Path, port: int = 29611) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=tp)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    args = argparse.Namespace(**{**SIZES, **COMMON, **STYLES[style]})
    args.tensor_model_parallel_size, args.pipeline_model_parallel_size = tp, 1
    args.padded_vocab_size = -(-args.vocab_size // (128 * tp)) * 128 * tp
    model = build(args, tp)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, args.vocab_size, (2, 24)))
    T = tokens.shape[1]
    hidden = torch.ones(1, 1, T, T).tril() < 0.5
    with torch.no_grad():
        logits = model(tokens, torch.arange(T)[None].expand(2, T), hidden)
    parts = [torch.empty_like(logits) for _ in range(tp)]
    dist.all_gather(parts, logits.contiguous())
    if rank == 0:
        np.save(folder / "tokens.npy", tokens.numpy().astype(np.int32))
        np.save(folder / "logits.npy", torch.cat(parts, -1)[..., : args.vocab_size].numpy())
    save(model, args, rank, tp, folder)
    dist.destroy_process_group()


def build(args: argparse.Namespace, tp: int) -> GPTModel:
    cfg = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, kv_channels=args.kv_channels,
        num_attention_heads=args.num_attention_heads, ffn_hidden_size=args.ffn_hidden_size,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        normalization=args.normalization, layernorm_epsilon=args.norm_epsilon,
        layernorm_zero_centered_gamma=args.apply_layernorm_1p, qk_layernorm=args.qk_layernorm,
        gated_linear_unit=args.swiglu, add_bias_linear=args.add_bias_linear,
        activation_func=torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        add_qkv_bias=args.add_qkv_bias, attention_dropout=0.0, hidden_dropout=0.0,
        bias_activation_fusion=False, gradient_accumulation_fusion=False, apply_rope_fusion=False,
        masked_softmax_fusion=False, bias_dropout_fusion=False, attention_softmax_in_fp32=True,
        use_cpu_initialization=True, tensor_model_parallel_size=tp, params_dtype=torch.float32,
    )  # fmt: skip
    model = GPTModel(
        cfg, get_gpt_layer_local_spec(normalization=args.normalization,
                                      qk_layernorm=args.qk_layernorm),
        vocab_size=args.padded_vocab_size, max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type, rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent, rope_scaling=args.use_rope_scaling,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():  # norms and biases too, and the same on all ranks
            split = getattr(p, "tensor_model_parallel", False)
            part = parallel_state.get_tensor_model_parallel_rank() if split else 0
            seed = torch.Generator().manual_seed(zlib.crc32(f"{name} {part}".encode()))
            one = "norm" in name and name.endswith("weight") and not args.apply_layernorm_1p
            p.copy_(one + 0.2 * torch.randn(p.shape, generator=seed))
    return model.eval()


def save(model: GPTModel, args: argparse.Namespace, rank: int, tp: int, folder: Path) -> None:
    about = {"args": args, "checkpoint_version": 3.0, "iteration": 3}
    step = folder / "torch_dist" / "iter_0000003"
    step.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    sharded = model.sharded_state_dict()
    dist_checkpointing.save({**about, "model": sharded}, str(step))
    step = folder / "legacy" / "iter_0000003"
    own = step / f"mp_rank_{rank:02d}"
    own.mkdir(parents=True, exist_ok=True)
    random = [{"random_rng_state": (3, (1, 2)), "np_rng_state": np.random.get_state(),
               "torch_rng_state": torch.get_rng_state()}]  # fmt: skip
    whole = {**about, "model": model.state_dict_for_save_checkpoint(), "rng_state": random}
    torch.save(whole, own / "model_optim_rng.pt")
    if rank == 0:
        for kind in ("torch_dist", "legacy"):
            (folder / kind / "latest_checkpointed_iteration.txt").write_text("3")


if __name__ == "__main__":
    rank, tp, style, folder, *port = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    main(int(rank), int(tp), style, Path(folder), *map(int, port))
