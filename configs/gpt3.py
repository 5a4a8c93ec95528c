"""GPT at the sizes of Megatron-LM's second and third paper, to a trillion parameters.

Narayanan et al. 2021, table 1: as many GPUs as there, in the same tensor, pipeline and data
parallelism, with as many chunks of layers a stage where the paper interleaves.

mlm-jax train --config gpt3:1.7b --config.layout.dp=32 --workdir runs/1.7b
mlm-jax train --config gpt3:3.6b --config.layout.dp=32 --config.layout.tp=2 --workdir runs/3.6b
mlm-jax train --config gpt3:7.5b --config.layout.dp=32 --config.layout.tp=4 --workdir runs/7.5b
mlm-jax train --config gpt3:18.4b --config.layout.dp=32 --config.layout.tp=8 --workdir runs/18.4b
mlm-jax train --config gpt3:39.1b --config.layout.pp=2 --config.layout.dp=32 --config.layout.tp=8 --workdir runs/39.1b
mlm-jax train --config gpt3:76.1b --config.layout.pp=4 --config.layout.dp=32 --config.layout.tp=8 --config.layout.chunks=3 --workdir runs/76.1b
mlm-jax train --config gpt3:145.6b --config.layout.pp=8 --config.layout.dp=24 --config.layout.tp=8 --config.layout.chunks=2 --workdir runs/145.6b
mlm-jax train --config gpt3:310.1b --config.layout.pp=16 --config.layout.dp=15 --config.layout.tp=8 --config.layout.chunks=2 --workdir runs/310.1b
mlm-jax train --config gpt3:529.6b --config.layout.pp=35 --config.layout.dp=9 --config.layout.tp=8 --config.layout.chunks=3 --workdir runs/529.6b
mlm-jax train --config gpt3:1008b --config.layout.pp=64 --config.layout.dp=6 --config.layout.tp=8 --workdir runs/1008b

It measured, on A100s of 80 GB with full recomputation, by its own formula:

  size            1.7b  3.6b  7.5b  18.4b  39.1b  76.1b  145.6b  310.1b  529.6b  1008b
  GPUs              32    64   128    256    512   1024    1536    1920    2520   3072
  tp                 1     2     4      8      8      8       8       8       8      8
  pp                 1     1     1      1      2      4       8      16      35     64
  chunks             1     1     1      1      1      3       2       2       3      1
  TFLOP/s a GPU    137   138   142    135    138    140     148     155     163    163

Korthikanti et al. 2022, table 3: sequence parallelism and selective recomputation, no data
parallelism; seconds a step 1.10, 13.75, 37.83 and 71.49, against 1.42, 18.13, 49.05 and 94.42 with
full recomputation and without sequence parallelism.

mlm-jax train --config gpt3:22b --config.layout.tp=8 --config.layout.sequence_parallel=True --workdir runs/22b
mlm-jax train --config gpt3:175b --config.layout.pp=8 --config.layout.tp=8 --config.layout.chunks=3 --config.layout.sequence_parallel=True --workdir runs/175b
mlm-jax train --config gpt3:530b --config.layout.pp=35 --config.layout.tp=8 --config.layout.chunks=3 --config.layout.sequence_parallel=True --workdir runs/530b
mlm-jax train --config gpt3:1t --config.layout.pp=64 --config.layout.tp=8 --config.layout.sequence_parallel=True --workdir runs/1t

On other GPUs, other words. On one node of 8, `--config.layout.fsdp=8 --config.train.accumulate=64`
fits the 1.7b; what does not fit is refused with values that do. Every size is explained on a
laptop: `mlm-jax explain` takes the same --config words.
"""  # noqa: E501

from mlm_jax.config import defaults

SIZES = {  # layers, width, heads, sequences a step, microbatches a step
    "1.7b": (24, 2304, 24, 512, 1),
    "3.6b": (30, 3072, 32, 512, 1),
    "7.5b": (36, 4096, 32, 512, 1),
    "18.4b": (40, 6144, 48, 1024, 4),
    "39.1b": (48, 8192, 64, 1536, 12),
    "76.1b": (60, 10240, 80, 1792, 28),
    "145.6b": (80, 12288, 96, 2304, 48),
    "310.1b": (96, 16384, 128, 2160, 144),
    "529.6b": (105, 20480, 128, 2520, 280),
    "1008b": (128, 25600, 160, 3072, 512),
    # Korthikanti et al. 2022
    "22b": (48, 6144, 64, 4, 1),
    "175b": (96, 12288, 96, 64, 64),
    "530b": (105, 20480, 128, 280, 280),
    "1t": (128, 25600, 160, 512, 512),
}
SELECTIVE = ("22b", "175b", "530b", "1t")


def get_config(size: str = "1.7b"):
    cfg = defaults()
    m, t = cfg.model, cfg.train
    m.n_layers, m.d_model, m.n_heads, t.global_batch_size, t.accumulate = SIZES[size]
    m.vocab_size = 51200  # GPT-2's 50257, as Megatron pads it for 8 GPUs
    m.seq_len = 2048
    m.dropout = 0.1
    m.dtype = "bfloat16"
    t.steps = 500  # it measured speed: the rest is what the paper's scripts ask for
    t.remat = "selective" if size in SELECTIVE else "full"
    cfg.optimizer.lr = 1e-4
    cfg.optimizer.min_lr = 1e-5
    cfg.optimizer.warmup_steps = 3
    cfg.optimizer.decay_steps = 320
    cfg.optimizer.weight_decay = 0.01
    cfg.data.cross_document_attention = True  # as published; cuDNN's kernel takes no mask
    return cfg
