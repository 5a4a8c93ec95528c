"""Gemma 1, 2 and 3 (Gemma team 2024 and 2025), the models of text.

All scale embeddings by the root of the width, and store norms less 1. 2 and 3 norm what a half of a
block gives, too, and let most layers look back on a window only: every other one, and five of six,
of which the sixth rotates more slowly. 2 caps scores and logits; 3 norms queries and keys instead.
On a GPU of 80 GB, and on 8:

mlm-jax train --config gemma:3-1b --workdir runs/gemma3-1b
mlm-jax train --config gemma:2-2b --config.layout.fsdp=8 --workdir runs/gemma2-2b
mlm-jax train --config gemma:2-9b --config.layout.fsdp=8 --workdir runs/gemma2-9b
mlm-jax train --config gemma:1-7b --config.layout.fsdp=8 --workdir runs/gemma-7b
"""

import math

from mlm_jax.config import defaults

SIZES = {  # layers, width, heads, key/value heads, size of a head, mlp, vocabulary, window
    "1-7b": (28, 3072, 16, 16, 256, 24576, 256_000, None),
    "2-2b": (26, 2304, 8, 4, 256, 9216, 256_000, 4096),
    "2-9b": (42, 3584, 16, 8, 256, 14336, 256_000, 4096),
    "3-1b": (26, 1152, 4, 1, 256, 6912, 262_144, 512),
}


def get_config(size: str = "3-1b"):
    cfg = defaults()
    m = cfg.model
    m.n_layers, m.d_model, m.n_heads, m.n_kv_heads, m.head_dim, m.d_mlp = SIZES[size][:6]
    m.vocab_size, m.window = SIZES[size][6:]
    m.norm, m.norm_eps, m.norm_zero_centered = "rmsnorm", 1e-6, True
    m.positions, m.activation, m.bias = "rotary", "geglu", False
    m.embedding_scale, m.seq_len = math.sqrt(m.d_model), 8192
    if size.startswith("2-"):
        m.norm_placement, m.global_every = "both", 2
        m.attention_softcap, m.logit_softcap = 50.0, 30.0
    if size.startswith("3-"):
        m.norm_placement, m.global_every, m.qk_norm = "both", 6, True
        m.rotary_base, m.rotary_local_base = 1_000_000.0, 10_000.0
    m.dtype = "bfloat16"
    cfg.train.steps, cfg.train.remat = 100_000, "full"
    cfg.train.global_batch_size, cfg.train.accumulate = 512, 32
    cfg.optimizer.lr, cfg.optimizer.min_lr, cfg.optimizer.warmup_steps = 3e-4, 3e-5, 2000
    return cfg
