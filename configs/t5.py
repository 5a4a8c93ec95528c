"""T5 (Raffel et al. 2020), v1.0, v1.1 and mT5 (Xue et al. 2021), and a tiny one.

mlm-jax train --config t5:tiny --workdir runs/t5
mlm-jax generate --workdir runs/t5 --prompt "    for i in <extra_id_0>:" --beams 4

It learns to fill in what was taken out of a text (data.objective=spans), of 512 tokens as in the
paper; with pairs of texts (data.objective=pairs) it learns to write the second of the first:

pip install django    # whose catalogues are the built-in pairs
mlm-jax train --config t5:tiny --config.data.objective=pairs --workdir runs/t5-fr

Sizes: tiny; small, base, large, 3b, 11b; v1.1-small, -base, -large, -xl, -xxl (also of Flan-T5);
mt5-small, -base, -large, -xl, -xxl. On 8 GPUs:

mlm-jax train --config t5:large --config.layout.fsdp=8 --workdir runs/t5-large
mlm-jax train --config t5:v1.1-xl --config.layout.fsdp=4 --config.layout.tp=2 --workdir runs/t5-xl
"""

from mlm_jax.config import defaults

SIZES = {  # layers of each side, width, heads, size of a head, mlp
    "tiny": (2, 128, 4, 32, 512),
    "small": (6, 512, 8, 64, 2048),
    "base": (12, 768, 12, 64, 3072),
    "large": (24, 1024, 16, 64, 4096),
    "3b": (24, 1024, 32, 128, 16384),
    "11b": (24, 1024, 128, 128, 65536),
    "v1.1-small": (8, 512, 6, 64, 1024),
    "v1.1-base": (12, 768, 12, 64, 2048),
    "v1.1-large": (24, 1024, 16, 64, 2816),
    "v1.1-xl": (24, 2048, 32, 64, 5120),
    "v1.1-xxl": (24, 4096, 64, 64, 10240),
}


def get_config(size: str = "tiny"):
    cfg = defaults()
    m = cfg.model
    same = size.replace("mt5-", "v1.1-")
    m.n_layers, m.d_model, m.n_heads, m.head_dim, m.d_mlp = SIZES[same]
    m.family, m.positions, m.norm, m.norm_eps = "t5", "relative", "rmsnorm", 1e-6
    m.bias, m.attention_scale = False, 1.0
    if same.startswith("v1.1-"):
        m.activation, m.tied = "geglu", False
    else:
        m.activation = "relu"
        m.logit_scale = m.get_ref("d_model").to_float() ** -0.5
    cfg.optimizer.warmup_steps = 50
    if size == "tiny":
        m.seq_len, m.target_len = 128, 32
        m.init_std = 0.06  # as in quickstart
        cfg.train.steps, cfg.train.global_batch_size = 600, 16
        cfg.optimizer.lr = 4e-3
        return cfg
    # Published tables have a multiple of 128 rows: 32,100 and 250,100 tokens, and empty ones.
    m.vocab_size = 250_112 if size.startswith("mt5-") else 32_128
    m.seq_len, m.target_len = 512, 114  # 568 tokens of text
    m.dtype = "bfloat16"
    cfg.train.steps, cfg.train.global_batch_size = 2**19, 128
    cfg.train.remat = "selective"
    cfg.optimizer.name, cfg.optimizer.weight_decay = "adafactor", 0.0
    cfg.optimizer.schedule = "inverse_sqrt"  # 1 / sqrt(step), at first 0.01
    cfg.optimizer.lr, cfg.optimizer.warmup_steps = 0.01, 10_000
    return cfg
