"""A GPT of 1 M parameters that learns the form of a conversation, on a laptop's CPU.

mlm-jax train --config chat --workdir runs/chat

From the built-in questions and answers about Python's standard library: it learns to answer in turn
and to stop, not to know. For conversations of your own set data.path to JSON lines of
{"messages": [...]}, data.tokenizer, and model.vocab_size to its size.
"""

from mlm_jax.config import defaults


def get_config():
    cfg = defaults()
    cfg.model.norm, cfg.model.positions = "rmsnorm", "rotary"
    cfg.model.bias = False
    cfg.model.init_std = 0.06  # as in quickstart
    cfg.data.objective = "chat"
    cfg.train.steps = 800
    cfg.train.global_batch_size = 8
    cfg.train.remat = "selective"
    cfg.optimizer.lr = 4e-3
    cfg.optimizer.warmup_steps = 50
    return cfg
