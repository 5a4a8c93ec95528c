"""A GPT of 1 M parameters that learns to translate menus and messages, on a laptop's CPU.

pip install django    # whose catalogues are the built-in pairs
mlm-jax train --config translate --workdir runs/translate
mlm-jax train --config translate:en-de --workdir runs/german

Some hundred short pairs: it shows the way, and learns most of them by heart. For pairs of your own
set data.path to JSON lines of {"source": ..., "target": ...} or a .tsv of two columns,
data.tokenizer, and model.vocab_size to its size.
"""

from mlm_jax.config import defaults


def get_config(languages: str | None = None):
    cfg = defaults()
    cfg.model.norm, cfg.model.positions = "rmsnorm", "rotary"
    cfg.model.bias = False
    cfg.model.init_std = 0.06  # as in quickstart
    cfg.model.dropout = 0.1
    cfg.data.objective = "pairs"
    cfg.data.builtin = languages  # en-fr, en-de
    cfg.train.steps = 300
    cfg.train.global_batch_size = 8
    cfg.train.remat = "selective"
    cfg.optimizer.lr = 3e-3
    cfg.optimizer.warmup_steps = 30
    return cfg
