"""Pythia (Biderman et al. 2023), of the make of GPT-NeoX (Black et al. 2022).

Attention and feed-forward read the residual stream side by side, each through a norm of its own; a
quarter of a head's numbers rotate. A step is 1024 sequences of 2048 tokens, and there are 143,000.
On a GPU of 80 GB, and on 8:

mlm-jax train --config pythia:160m --workdir runs/pythia-160m
mlm-jax train --config pythia:1.4b --config.layout.fsdp=8 --workdir runs/pythia-1.4b
mlm-jax train --config pythia:6.9b --config.layout.fsdp=8 --workdir runs/pythia-6.9b
"""

from mlm_jax.config import defaults

SIZES = {  # layers, width, heads, rows of the tables, peak learning rate (table 1, and its configs)
    "160m": (12, 768, 12, 50304, 6e-4),
    "1.4b": (24, 2048, 16, 50304, 2e-4),
    "6.9b": (32, 4096, 32, 50432, 1.2e-4),
}


def get_config(size: str = "160m"):
    cfg = defaults()
    m = cfg.model
    m.n_layers, m.d_model, m.n_heads, m.vocab_size, cfg.optimizer.lr = SIZES[size]
    m.d_mlp = 4 * m.get_ref("d_model")
    m.seq_len, m.tied, m.activation = 2048, False, "gelu_exact"
    m.parallel, m.parallel_norms = True, 2
    m.positions, m.rotary_share = "rotary", 0.25
    m.dtype = "bfloat16"
    cfg.train.steps, cfg.train.remat = 143_000, "full"
    cfg.train.global_batch_size, cfg.train.accumulate = 1024, 32
    cfg.optimizer.min_lr, cfg.optimizer.warmup_steps = cfg.optimizer.lr / 10, 1430
    cfg.optimizer.weight_decay = 0.1
    cfg.data.cross_document_attention = True  # as published; cuDNN's kernel takes no mask
    return cfg
