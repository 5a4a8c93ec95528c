"""Settings that contradict each other, or that would do nothing."""

import dataclasses
import math

from mlm_jax.batch_sizes import BatchSizes, parse_schedule
from mlm_jax.config import OBJECTIVES, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def misfits(run: RunConfig) -> list[str]:
    """Settings that contradict each other, or that would do nothing."""
    m, t, d = run.model, run.train, run.data
    checks = [
        (m.head_dim == m.d_model // m.n_heads and m.d_model % m.n_heads,
         f"model.d_model={m.d_model} does not divide by model.n_heads={m.n_heads}; try n_heads"
         f" {near_divisors(m.d_model, m.n_heads)}, or set model.head_dim"),
        (m.n_heads % m.n_kv_heads,
         f"model.n_kv_heads={m.n_kv_heads} does not divide model.n_heads={m.n_heads}; try"
         f" {near_divisors(m.n_heads, m.n_kv_heads)}"),
        (m.positions == "rotary" and m.head_dim % 2,
         f"model.head_dim={m.head_dim} is odd; model.positions='rotary' rotates pairs"),
        *[(m.positions != "rotary" and getattr(m, key) != getattr(ModelConfig, key),
           f"model.{key}={getattr(m, key)} does nothing without model.positions='rotary'")
          for key in ("rotary_base", "rotary_share", "rotary_local_base", "rope_scaling",
                      "nope_every")],
        (m.rope_scaling == "none" and m.rope_factor != 1.0,
         f"model.rope_factor={m.rope_factor} does nothing with model.rope_scaling='none'"),
        (m.rope_scaling != "none" and m.rope_factor == 1.0,
         f"model.rope_scaling={m.rope_scaling!r} does nothing with model.rope_factor=1; try 8"),
        *[(m.rope_scaling in ("none", "linear") and getattr(m, key) != getattr(ModelConfig, key),
           f"model.{key}={getattr(m, key)} does nothing with model.rope_scaling={m.rope_scaling!r}")
          for key in ("rope_original_seq_len", "rope_low", "rope_high")],
        (m.rope_low >= m.rope_high,
         f"model.rope_low={m.rope_low} is not below model.rope_high={m.rope_high}"),
        *[((getattr(m, key) or 0) > m.n_layers,
           f"model.{key}={getattr(m, key)} does nothing in {m.n_layers} layers")
          for key in ("nope_every", "global_every")],
        *[(getattr(m, key) == 0, f"model.{key}=0 leaves nothing to train; try 1")
          for key in ("embedding_scale", "residual_scale", "attention_scale", "logit_scale")],
        (m.rope_scaling == "yarn" and m.rope_low == 0,
         "model.rope_low=0 is no number of turns for model.rope_scaling='yarn'; try 1"),
        (m.attention == "cudnn" and (m.head_dim % 8 or m.head_dim > 128),
         f"model.attention='cudnn' takes heads of 8, 16, ... 128 numbers, not"
         f" model.head_dim={m.head_dim}; try 'auto'"),
        (m.global_every and not m.window,
         f"model.global_every={m.global_every} does nothing without model.window"),
        (m.window and m.window >= m.seq_len,
         f"model.window={m.window} does nothing in a context of model.seq_len={m.seq_len}"),
        *[(m.attention == "cudnn" and getattr(m, key),
           f"model.attention='cudnn' has no model.{key}={getattr(m, key)}; try 'auto'")
          for key in ("attention_softcap", "global_every")],
        (m.attention == "cudnn" and m.dtype != "bfloat16",
         f"model.attention='cudnn' does not compute in model.dtype={m.dtype!r}; try bfloat16"),
        (m.attention == "cudnn" and not m.causal,
         "model.attention='cudnn' is given no mask of padding, which a bert's texts have; try"
         " 'auto'"),
        (m.attention == "cudnn" and m.causal and not d.cross_document_attention,
         "model.attention='cudnn' is given no mask between packed documents; try"
         " model.attention='auto', or data.cross_document_attention=True"),
        (t.global_batch_size % t.accumulate,
         f"train.global_batch_size={t.global_batch_size} does not divide by train.accumulate="
         f"{t.accumulate}; try accumulate {near_divisors(t.global_batch_size, t.accumulate)}"),
    ]  # fmt: skip
    found = [message for wrong, message in checks if wrong]
    return (
        found + family_misfits(m) + batch_misfits(run) + data_misfits(run) + optimizer_misfits(run)
    )


def family_misfits(m: ModelConfig) -> list[str]:
    """Nouns of a model that its family, or another noun, has no use for."""
    default = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    default |= {"n_decoder_layers": m.n_layers, "target_len": m.seq_len}
    checks = [
        (m.positions == "rotary" and not 2 <= m.rotary_dim <= m.head_dim,
         f"model.rotary_share={m.rotary_share} is a share of model.head_dim={m.head_dim}, two"
         " numbers of it or more"),
        (m.positions == "rotary" and m.rotary_share != 1 and m.rotary_dim % 2,
         f"model.rotary_share={m.rotary_share} of model.head_dim={m.head_dim} is"
         f" {m.rotary_dim}: pairs rotate, so it must be even"),
        (m.rotary_local_base is not None and not m.window,
         f"model.rotary_local_base={m.rotary_local_base} does nothing without model.window"),
        (m.parallel and m.norm_placement != "pre",
         f"model.parallel=True norms what is read; leave model.norm_placement={m.norm_placement!r}"
         " at 'pre'"),
        (m.parallel_norms != 1 and not m.parallel,
         f"model.parallel_norms={m.parallel_norms} does nothing with model.parallel=False"),
        (m.norm == "rmsnorm" and m.norm_bias and not m.bias,
         "model.norm_bias=True does nothing with model.norm='rmsnorm'"),
        (m.order_head and m.family == "bert" and not m.pooler,
         "model.order_head=True reads the pooler; set model.pooler=True, or order_head=False"),
        (m.order_head and m.family == "bert" and m.token_types == 1,
         "model.token_types=1: model.order_head=True tells two segments apart; set token_types=2,"
         " or order_head=False"),
        (m.family == "bert" and not m.tied, "model.tied=False: a bert's head is its table"),
        *[(m.family not in families and getattr(m, key) != default[key],
           f"model.{key}={getattr(m, key)!r} does nothing with model.family={m.family!r}")
          for key, families in FAMILY_NOUNS.items()],
        (m.seq2seq and m.attention == "cudnn",
         "model.attention='cudnn' is given no relative positions; try 'auto'"),
        (m.seq2seq and m.norm_placement != "pre",
         f"model.norm_placement={m.norm_placement!r} is not for model.family='t5'; try 'pre'"),
        (m.seq2seq and m.relative_distance <= m.relative_buckets // 2,
         f"model.relative_distance={m.relative_distance} leaves no far buckets of"
         f" model.relative_buckets={m.relative_buckets}; try {4 * m.relative_buckets}"),
        (m.seq2seq and m.relative_buckets % 4,
         f"model.relative_buckets={m.relative_buckets} are two halves, each half near and half far;"
         " try 32"),
        ((m.positions == "relative") != (m.family == "t5"),
         f"model.positions={m.positions!r} is not for model.family={m.family!r}; relative is for"
         " t5 alone"),
    ]  # fmt: skip
    return [message for wrong, message in checks if wrong]


FAMILY_NOUNS = {  # which families have a use for a noun that is not for all
    "n_decoder_layers": ("t5",), "target_len": ("t5",),
    "relative_buckets": ("t5",), "relative_distance": ("t5",),
    "token_types": ("bert",), "mlm_head": ("bert",), "pooler": ("bert",), "order_head": ("bert",),
    "window": ("gpt",), "parallel": ("gpt",), "attention_softcap": ("gpt",),
    "qk_norm": ("gpt", "bert"),
}  # fmt: skip


def batch_misfits(run: RunConfig) -> list[str]:
    t = run.train
    if t.batch_schedule is None or t.global_batch_size % t.accumulate:
        return []
    try:
        sizes = [size for _, size in parse_schedule(t.batch_schedule, run.model.seq_len)]
    except ValueError as why:
        return [f"train.batch_schedule={t.batch_schedule!r} is not {why}"]
    checks = [
        (len(sizes) == 1,
         f"train.batch_schedule={t.batch_schedule!r} has one size; set train.global_batch_size"),
        (BatchSizes.of(run).size(t.steps - 1) != sizes[-1],
         f"train.batch_schedule={t.batch_schedule!r} does not come to its last size in"
         f" train.steps={t.steps}"),
        (sizes[-1] != t.global_batch_size,
         f"train.batch_schedule={t.batch_schedule!r} ends with {sizes[-1]}, not with"
         f" train.global_batch_size={t.global_batch_size}; set global_batch_size to {sizes[-1]}"),
        *[(size > t.microbatch and size % t.microbatch,
           f"train.batch_schedule: {size} is no multiple of a microbatch, {t.microbatch} sequences"
           " = train.global_batch_size / train.accumulate; try"
           f" {size // t.microbatch * t.microbatch}")
          for size in sizes],
    ]  # fmt: skip
    return [message for wrong, message in checks if wrong]


def data_misfits(run: RunConfig) -> list[str]:
    d = run.data
    default = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    own, family = BUILTIN[d.objective], run.model.family
    without_path = "does nothing with a built-in corpus; set data.path"
    checks = [
        *[(d.path is None and getattr(d, key) is not None,
           f"data.{key}={getattr(d, key)!r} {without_path}")
          for key in ("tokenizer", "valid_path")],
        (d.path is None and d.split != default["split"],
         f"data.split={d.split!r} does nothing: a built-in corpus holds out documents of its own"),
        (d.path is not None and d.builtin is not None,
         f"data.builtin={d.builtin!r} does nothing with data.path={d.path!r}; set one of them"),
        (d.builtin is not None and d.builtin not in own,
         f"data.builtin={d.builtin!r} is not for data.objective={d.objective!r}; try"
         f" {' or '.join(own)}"),
        (d.valid_path is not None and d.split != default["split"],
         f"data.split={d.split!r} does nothing with data.valid_path={d.valid_path!r}"),
        (d.path is not None and d.tokenizer is None and d.objective != "causal",
         f"data.objective={d.objective!r} needs data.tokenizer"),
        (d.objective != "pairs" and d.prompt != default["prompt"],
         f"data.prompt={d.prompt!r} does nothing with data.objective={d.objective!r}"),
        ("{source}" not in d.prompt,
         f"data.prompt={d.prompt!r} has no place for the source; try {default['prompt']!r}"),
        (d.objective == "fim" and d.fim_rate == 0,
         "data.fim_rate=0 rearranges nothing; try data.objective='causal'"),
        *[(d.objective != "fim" and getattr(d, key) != default[key],
           f"data.{key}={getattr(d, key)!r} does nothing with data.objective={d.objective!r}")
          for key in ("fim_rate", "fim_spm_rate", "fim_tokens")],
        *[(getattr(d, key) > 1, f"data.{key}={getattr(d, key)} is a share: 1 at most")
          for key in ("fim_rate", "fim_spm_rate")],
        *[(d.objective in objectives and getattr(d, key) != default[key],
           f"data.{key}={getattr(d, key)!r} does nothing with data.objective={d.objective!r}")
          for key, objectives in IDLE_WITH.items()],
        (d.objective not in OBJECTIVES[family],
         f"data.objective={d.objective!r} is not for model.family={family!r}; try"
         f" {' or '.join(OBJECTIVES[family])}"),
        (d.objective == "masked" and run.model.seq_len < 8,
         f"model.seq_len={run.model.seq_len} leaves no room in [CLS] A [SEP] B [SEP]; try 64"),
        *[(run.model.seq2seq and getattr(d, key) != default[key],
           f"data.{key}={getattr(d, key)!r} does nothing with model.family='t5'")
          for key in ("cross_document_attention", "reset_positions", "eod_mask_loss")],
        (d.reset_positions is not None and run.model.positions == "none",
         f"data.reset_positions={d.reset_positions} does nothing with model.positions='none'"),
    ]  # fmt: skip
    return [message for wrong, message in checks if wrong]


BUILTIN = {  # corpora by objective, the default first
    "causal": ("python", "prose"), "fim": ("python",), "chat": ("conversations",),
    "pairs": ("en-fr", "en-de"), "masked": ("sentences",), "spans": ("python", "prose"),
}  # fmt: skip
IDLE_WITH = {  # settings that some objectives have no use for
    "eod_mask_loss": ("chat", "pairs", "masked"), "epochs": ("chat", "pairs", "masked"),
    "cross_document_attention": ("masked",), "reset_positions": ("masked",),
}  # fmt: skip


def optimizer_misfits(run: RunConfig) -> list[str]:
    m, o = run.model, run.optimizer
    default = {field.name: field.default for field in dataclasses.fields(OptimizerConfig)}
    never_ends = o.schedule in ("constant", "inverse_sqrt")
    warm, decay, last = o.warmup_steps, o.decay_steps, o.wsd_decay_steps
    checks = [
        (o.min_lr > o.lr, f"optimizer.min_lr={o.min_lr} is above optimizer.lr={o.lr}"),
        (o.schedule == "constant" and o.min_lr,
         f"optimizer.min_lr={o.min_lr} does nothing: optimizer.schedule='constant' never decays;"
         " set optimizer.min_lr=0"),
        (never_ends and decay,
         f"optimizer.decay_steps={decay} does nothing: optimizer.schedule={o.schedule!r} has no"
         " last step; set optimizer.decay_steps=None"),
        (not never_ends and decay and warm >= decay,
         f"optimizer.warmup_steps={warm} leaves nothing of optimizer.decay_steps={decay} to decay"),
        (o.schedule == "wsd" and not last,
         "optimizer.schedule='wsd' needs optimizer.wsd_decay_steps; try"
         f" {max((decay or run.train.steps) // 10, 1)}"),
        (o.schedule == "wsd" and decay and last and warm < decay < warm + last,
         f"optimizer.wsd_decay_steps={last} does not fit into optimizer.decay_steps={decay} after"
         f" optimizer.warmup_steps={warm}; try wsd_decay_steps {decay and decay - warm}"),
        (o.weight_decay_schedule != "constant" and o.weight_decay_end is None,
         f"optimizer.weight_decay_schedule={o.weight_decay_schedule!r} does nothing without"
         " optimizer.weight_decay_end"),
        (o.weight_decay_schedule == "constant" and o.weight_decay_end is not None,
         f"optimizer.weight_decay_end={o.weight_decay_end} does nothing with"
         " optimizer.weight_decay_schedule='constant'; try linear or cosine"),
        (o.weight_decay_schedule != "constant" and o.weight_decay_end == o.weight_decay,
         f"optimizer.weight_decay_end={o.weight_decay_end} is optimizer.weight_decay: nothing"
         f" changes; set optimizer.weight_decay_schedule='constant' and weight_decay_end=None"),
        (m.tied and o.head_lr_scale != 1,
         f"optimizer.head_lr_scale={o.head_lr_scale} does nothing with model.tied=True: the"
         " embedding's table is the head; set optimizer.embedding_lr_scale"),
    ]  # fmt: skip
    for key, (what, users) in USERS.items():
        value, here = getattr(o, key), getattr(o, what)
        checks.append((
            value != default[key] and here not in users,
            f"optimizer.{key}={value!r} does nothing with optimizer.{what}={here!r}, but with"
            f" {' or '.join(users)}; leave it at {default[key]}",
        ))  # fmt: skip
    return [message for wrong, message in checks if wrong]


USERS = {  # settings of an optimizer that not all choices use: which do
    "b1": ("name", ("adamw", "lion", "muon")),
    "b2": ("name", ("adamw", "lion", "muon")),
    "eps": ("name", ("adamw", "muon")),
    "momentum": ("name", ("muon", "sgd")),
    "moment_dtype": ("name", ("adamw", "lion", "muon", "sgd")),
    "wsd_decay_steps": ("schedule", ("wsd",)),
    "wsd_decay_style": ("schedule", ("wsd",)),
}


def near_divisors(n: int, k: int) -> str:
    below = [d for d in range(1, min(math.isqrt(n), 10**6) + 1) if n % d == 0]
    divisors = sorted({*below, *(n // d for d in below)}, key=lambda d: (abs(d - k), d))
    return " or ".join(str(d) for d in sorted(divisors[:2]))
