"""mlm-jax train --config gpt2:124m --config.layout.preset=dp --workdir runs/124m"""

from mlm_jax.config import defaults

SIZES = {  # layers, width, heads: Radford et al. 2019
    "124m": (12, 768, 12),
    "355m": (24, 1024, 16),
    "774m": (36, 1280, 20),
    "1.5b": (48, 1600, 25),
}


def get_config(size: str = "124m"):
    cfg = defaults()
    cfg.model.n_layers, cfg.model.d_model, cfg.model.n_heads = SIZES[size]
    cfg.model.vocab_size = 50257  # the tokenizer's; weights round it up to 128 rows by themselves
    cfg.model.seq_len = 1024
    cfg.model.dropout = 0.1
    cfg.model.dtype = "bfloat16"
    cfg.train.steps = 300_000
    cfg.train.global_batch_size = 512
    cfg.train.accumulate = 8
    cfg.train.eval_every = 1000
    cfg.train.remat = "selective"
    cfg.optimizer.lr = 1.5e-4  # Shoeybi et al. 2019, section 4.1
    cfg.optimizer.min_lr = 1e-5
    cfg.optimizer.warmup_steps = 3000
    cfg.optimizer.weight_decay = 0.01
    cfg.checkpoint.every = 1000
    return cfg
