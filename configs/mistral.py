"""Mistral (Jiang et al. 2023): a Llama whose tokens look back on a window.

On 8 GPUs of 80 GB:

mlm-jax train --config mistral:7b --config.layout.fsdp=8 --workdir runs/mistral-7b

0.1 has a window of 4096 tokens; later versions have none: --config.model.window=None.
"""

from mlm_jax.config import defaults

SIZES = {  # layers, width, heads, key/value heads, mlp
    "7b": (32, 4096, 32, 8, 14336),
}


def get_config(size: str = "7b"):
    cfg = defaults()
    m = cfg.model
    m.n_layers, m.d_model, m.n_heads, m.n_kv_heads, m.d_mlp = SIZES[size]
    m.norm, m.positions, m.activation = "rmsnorm", "rotary", "swiglu"
    m.bias, m.tied = False, False
    m.vocab_size, m.seq_len, m.window = 32_000, 8192, 4096
    m.dtype = "bfloat16"
    cfg.train.steps, cfg.train.remat = 100_000, "full"
    cfg.train.global_batch_size, cfg.train.accumulate = 512, 8
    cfg.optimizer.lr, cfg.optimizer.min_lr, cfg.optimizer.warmup_steps = 3e-4, 3e-5, 2000
    cfg.data.cross_document_attention = True  # as published; cuDNN's kernel takes no mask
    return cfg
