"""GPT-2 (Radford et al. 2019), and the sizes of Megatron-LM's first paper (Shoeybi et al. 2019).

On 8 GPUs of 80 GB:

mlm-jax train --config gpt2:124m --config.layout.dp=8 --workdir runs/124m
mlm-jax train --config gpt2:1.2b --config.layout.fsdp=8 --workdir runs/1.2b

On 64, 128, 256 and 512 GPUs of 32 GB, split as in the paper (its figure 5):

mlm-jax train --config gpt2:1.2b --config.layout.dp=64 --workdir runs/1.2b
mlm-jax train --config gpt2:2.5b --config.layout.dp=64 --config.layout.tp=2 --workdir runs/2.5b
mlm-jax train --config gpt2:4.2b --config.layout.dp=64 --config.layout.tp=4 --workdir runs/4.2b
mlm-jax train --config gpt2:8.3b --config.layout.dp=64 --config.layout.tp=8 --workdir runs/8.3b

The paper trained 355m, 2.5b and 8.3b for 300,000 steps on 174 GB of text (sections 4 and 5), to a
perplexity of 19.31, 12.76 and 10.81 on WikiText103 and an accuracy of 45.18, 61.73 and 66.51 % on
LAMBADA (table 3). On the built-in corpus, which a run uses until data.path is set, expect neither.
"""

from mlm_jax.config import defaults

SIZES = {  # layers, width, heads, vocabulary
    "124m": (12, 768, 12, 50257),  # Radford et al. 2019: the tokenizer's vocabulary
    "355m": (24, 1024, 16, 50257),
    "774m": (36, 1280, 20, 50257),
    "1.5b": (48, 1600, 25, 50257),
    # Shoeybi et al. 2019, table 1; their vocabulary is padded. All have 32 heads here, so that tp
    # may be 8. The paper's are 16, 20, 24 and 32, each of size 96 (its trained 8.3b: 24), and
    # --config.model.n_heads sets them. At 2.5b, 32 heads have size 60, which is no multiple of 8
    # as cuDNN's kernel wants it: 20 are faster there.
    "1.2b": (40, 1536, 32, 51200),
    "2.5b": (54, 1920, 32, 51200),
    "4.2b": (64, 2304, 32, 51200),
    "8.3b": (72, 3072, 32, 51200),
}


def get_config(size: str = "124m"):
    cfg = defaults()
    m = cfg.model
    m.n_layers, m.d_model, m.n_heads, m.vocab_size = SIZES[size]
    m.seq_len = 1024
    m.dropout = 0.1
    m.dtype = "bfloat16"
    cfg.train.steps = 300_000
    cfg.train.global_batch_size = 512
    cfg.train.accumulate = 8
    cfg.train.eval_every = 1000
    cfg.train.remat = "selective"
    cfg.optimizer.lr = 1.5e-4  # from here on Shoeybi et al. 2019, section 4.1
    cfg.optimizer.min_lr = 1e-5
    cfg.optimizer.warmup_steps = 3000
    cfg.optimizer.weight_decay = 0.01
    cfg.checkpoint.every = 1000
    cfg.data.cross_document_attention = True  # as published; cuDNN's kernel takes no mask
    return cfg
