"""Qwen 2.5 (Qwen team 2024) and Qwen 3 (Qwen team 2025).

2.5 has biases for queries, keys and values alone; 3 has none, norms each head's query and key, and
sizes of heads that do not follow from the width. On a GPU of 80 GB, and on 8:

mlm-jax train --config qwen:2.5-0.5b --workdir runs/qwen2.5-0.5b
mlm-jax train --config qwen:2.5-7b --config.layout.fsdp=8 --workdir runs/qwen2.5-7b
mlm-jax train --config qwen:3-0.6b --config.layout.dp=8 --workdir runs/qwen3-0.6b
mlm-jax train --config qwen:3-8b --config.layout.fsdp=8 --workdir runs/qwen3-8b
"""

from mlm_jax.config import defaults

SIZES = {  # layers, width, heads, key/value heads, size of a head, mlp, vocabulary, tied
    "2.5-0.5b": (24, 896, 14, 2, 64, 4864, 151_936, True),
    "2.5-7b": (28, 3584, 28, 4, 128, 18944, 152_064, False),
    "3-0.6b": (28, 1024, 16, 8, 128, 3072, 151_936, True),
    "3-8b": (36, 4096, 32, 8, 128, 12288, 151_936, False),
}


def get_config(size: str = "2.5-0.5b"):
    cfg = defaults()
    m = cfg.model
    m.n_layers, m.d_model, m.n_heads, m.n_kv_heads, m.head_dim, m.d_mlp = SIZES[size][:6]
    m.vocab_size, m.tied = SIZES[size][6:]
    m.norm, m.norm_eps, m.positions, m.activation = "rmsnorm", 1e-6, "rotary", "swiglu"
    m.bias, m.qkv_bias = False, size.startswith("2.5")
    m.qk_norm = size.startswith("3-")
    m.rotary_base, m.seq_len = 1_000_000.0, 4096
    m.dtype = "bfloat16"
    cfg.train.steps, cfg.train.remat = 100_000, "full"
    cfg.train.global_batch_size, cfg.train.accumulate = 512, 16
    cfg.optimizer.lr, cfg.optimizer.min_lr, cfg.optimizer.warmup_steps = 3e-4, 3e-5, 2000
    cfg.data.cross_document_attention = True  # cuDNN's kernel takes no mask
    return cfg
