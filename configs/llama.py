"""mlm-jax train --config llama:8b --config.layout.fsdp=8 --workdir runs/8b

The shapes of Llama 3 (Grattafiori et al. 2024, table 3); without its rope scaling.
"""

from mlm_jax.config import defaults

SIZES = {  # layers, width, heads, key/value heads, mlp
    "tiny": (4, 128, 4, 2, 384),
    "8b": (32, 4096, 32, 8, 14336),
    "70b": (80, 8192, 64, 8, 28672),
    "405b": (126, 16384, 128, 8, 53248),
}


def get_config(size: str = "tiny"):
    cfg = defaults()
    m = cfg.model
    m.n_layers, m.d_model, m.n_heads, m.n_kv_heads, m.d_mlp = SIZES[size]
    m.norm, m.positions, m.activation = "rmsnorm", "rotary", "swiglu"
    m.bias, m.tied = False, False
    cfg.optimizer.lr = 3e-3
    cfg.optimizer.warmup_steps = 50
    if size != "tiny":
        m.vocab_size, m.seq_len, m.rotary_base = 128_256, 8192, 500_000.0
        m.dtype = "bfloat16"
        cfg.train.steps, cfg.train.remat = 100_000, "full"
        cfg.train.global_batch_size, cfg.train.accumulate = 512, 8
        cfg.optimizer.lr, cfg.optimizer.min_lr, cfg.optimizer.warmup_steps = 3e-4, 3e-5, 2000
    return cfg
