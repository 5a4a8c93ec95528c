"""BERT (Devlin et al. 2019), and the sizes of Megatron-LM's first paper (Shoeybi et al. 2019).

On a laptop's CPU, in some minutes, from the docstrings of installed packages; soon below the 6.3
nats a hidden word that the frequency of words alone gives:

mlm-jax train --config bert:tiny --workdir runs/bert

On 8 GPUs:

mlm-jax train --config bert:base --config.layout.dp=8 --workdir runs/base
mlm-jax train --config bert:large --config.layout.dp=8 --workdir runs/large

On 128, 256 and 512 GPUs, split as in the paper (section 5.3: Megatron's, with norms before the
sums):

mlm-jax train --config bert:336m --config.layout.dp=128 --workdir runs/336m
mlm-jax train --config bert:1.3b --config.layout.dp=64 --config.layout.tp=4 --workdir runs/1.3b
mlm-jax train --config bert:3.9b --config.layout.dp=64 --config.layout.tp=8 --workdir runs/3.9b

The paper trained with batches of 1024 for 2,000,000 steps (1.3b; 1,500,000 at 3.9b) at a learning
rate of 1e-4 with a warm-up over 10,000 and a linear decay; held-out perplexities of hidden words
are 1.58, 1.30 and 1.16. For texts of your own: mlm-jax data build --split_sentences, then set
data.path and data.tokenizer; of a vocab.txt of 30522 words these sizes are right.
"""

from mlm_jax.config import defaults

SIZES = {  # layers, width, heads, norms
    "tiny": (2, 128, 4, "post"),
    "base": (12, 768, 12, "post"),  # Devlin et al. 2019, section 3
    "large": (24, 1024, 16, "post"),
    "336m": (24, 1024, 16, "pre"),  # Shoeybi et al. 2019, table 4
    "1.3b": (24, 2048, 32, "pre"),
    "3.9b": (48, 2560, 40, "pre"),
}


def get_config(size: str = "base"):
    cfg = defaults()
    m, tiny, published = cfg.model, size == "tiny", size in ("tiny", "base", "large")
    m.n_layers, m.d_model, m.n_heads, m.norm_placement = SIZES[size]
    m.family = "bert"
    m.vocab_size, m.seq_len = (2048, 64) if tiny else (30522, 512)
    m.token_types = 2
    m.embedding_norm = published
    m.norm_eps = 1e-12 if published else 1e-5
    m.activation = "gelu_exact" if published else "gelu"
    if tiny:
        m.init_std = 0.06  # as in quickstart
        cfg.train.steps, cfg.train.global_batch_size = 800, 32
        cfg.optimizer.lr, cfg.optimizer.warmup_steps = 1e-3, 50
        cfg.optimizer.weight_decay = 0.01
        return cfg
    m.dropout = 0.1
    m.dtype = "bfloat16"
    cfg.train.steps = 1_000_000 if published else 2_000_000
    cfg.train.global_batch_size = 256 if published else 1024
    cfg.train.eval_every = 1000
    cfg.train.remat = "none" if published else "selective"
    cfg.optimizer.lr = 1e-4
    cfg.optimizer.schedule = "linear"
    cfg.optimizer.warmup_steps = 10_000
    cfg.optimizer.b2 = 0.999
    cfg.optimizer.weight_decay = 0.01
    cfg.checkpoint.every = 1000
    return cfg
