"""A GPT of 1 M parameters that learns to write Python from the standard library, on a laptop's CPU.

mlm-jax train --config quickstart --workdir runs/quickstart
"""

from mlm_jax.config import defaults


def get_config():
    cfg = defaults()  # mlm_jax/config.py: every key there is; the model's defaults are this one's
    cfg.train.steps = 1100
    cfg.train.global_batch_size = 8
    cfg.optimizer.lr = 4e-3
    cfg.optimizer.warmup_steps = 50
    return cfg
