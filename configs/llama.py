"""Llama 2 (Touvron et al. 2023), 3 and 3.1 (Grattafiori et al. 2024, table 3), and a tiny one.

mlm-jax train --config llama:tiny --workdir runs/llama

On 8 and on 128 GPUs of 80 GB, a microbatch of 1 to 4 sequences a GPU:

mlm-jax train --config llama:2-7b --config.layout.fsdp=8 --config.train.accumulate=64 --workdir runs/2-7b
mlm-jax train --config llama:3.1-8b --config.layout.fsdp=8 --config.train.accumulate=64 --workdir runs/3.1-8b
mlm-jax train --config llama:3.2-1b --config.layout.fsdp=8 --config.train.accumulate=32 --workdir runs/3.2-1b
mlm-jax train --config llama:3-8b --config.layout.fsdp=8 --config.train.accumulate=64 --workdir runs/3-8b
mlm-jax train --config llama:3-70b --config.layout.fsdp=16 --config.layout.tp=8 --workdir runs/3-70b

405b as in the paper's table 4, which has 8192 and 16384 GPUs as tp 8, cp 1 or 16, pp 16, and the
rest in what it calls DP, where weights are split: our fsdp. Its 126 layers are 8 on each stage but
the first and the last, which have 7; here all stages have as many, 14 of 9 layers: 7168 and twice
14336 GPUs. Steps are of 16.8 million tokens; the third has the sequences of 131,072 tokens that
3.1 was trained on in the end.

mlm-jax train --config llama:3.1-405b --config.layout.pp=14 --config.layout.fsdp=64 --config.layout.tp=8 --config.train.accumulate=32 --workdir runs/3.1-405b
mlm-jax train --config llama:3.1-405b --config.layout.pp=14 --config.layout.fsdp=128 --config.layout.tp=8 --config.train.accumulate=16 --workdir runs/3.1-405b
mlm-jax train --config llama:3.1-405b --config.layout.pp=14 --config.layout.fsdp=8 --config.layout.cp=16 --config.layout.tp=8 --config.train.accumulate=16 --config.train.global_batch_size=128 --config.model.seq_len=131072 --workdir runs/3.1-405b

On 512 GPUs without a pipeline, 4 sequences a group of 8:

mlm-jax train --config llama:3.1-405b --config.layout.fsdp=64 --config.layout.tp=8 --workdir runs/3.1-405b
"""  # noqa: E501

from mlm_jax.config import defaults

SIZES = {  # layers, width, heads, key/value heads, mlp, peak learning rate
    "tiny": (4, 128, 4, 2, 384, 3e-3),
    "2-7b": (32, 4096, 32, 32, 11008, 3e-4),
    "3-8b": (32, 4096, 32, 8, 14336, 3e-4),
    "3.1-8b": (32, 4096, 32, 8, 14336, 3e-4),
    "3.2-1b": (16, 2048, 32, 8, 8192, 3e-4),
    "3-70b": (80, 8192, 64, 8, 28672, 1.5e-4),
    "3.1-405b": (126, 16384, 128, 8, 53248, 8e-5),
}


def get_config(size: str = "tiny"):
    cfg = defaults()
    m = cfg.model
    m.n_layers, m.d_model, m.n_heads, m.n_kv_heads, m.d_mlp, cfg.optimizer.lr = SIZES[size]
    m.norm, m.positions, m.activation = "rmsnorm", "rotary", "swiglu"
    m.bias, m.tied = False, False
    cfg.optimizer.warmup_steps = 50
    if size != "tiny":
        # The paper masks documents, "with limited impact": without a mask cuDNN's kernel serves.
        cfg.data.cross_document_attention = True
        m.vocab_size = 128_256
        m.seq_len = 8192
        m.rotary_base = 500_000.0
        m.dtype = "bfloat16"
        cfg.train.steps, cfg.train.remat = 100_000, "full"
        cfg.train.global_batch_size, cfg.train.accumulate = 512, 8
        if size == "3.1-405b":
            cfg.train.global_batch_size = 2048
        cfg.optimizer.min_lr, cfg.optimizer.warmup_steps = cfg.optimizer.lr / 100, 2000
    if size == "2-7b":
        m.vocab_size, m.seq_len, m.rotary_base = 32_000, 4096, 10_000.0
    if size.startswith(("3.1", "3.2")):  # for sequences of 131,072 tokens, in the end
        m.rope_scaling, m.rope_factor = "llama3", 32.0 if size == "3.2-1b" else 8.0
        m.tied = size == "3.2-1b"
    return cfg
