"""Every setting, once: its key, default, unit and effect; and the one door they come in through.

`load_config("gpt2:124m", {"layout.tp": 2})` reads a config file, applies overrides, collects every
problem and raises one ConfigError, or returns a frozen RunConfig. Nothing here touches jax.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
import traceback
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlm_jax.errors import ConfigError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Table = tuple[tuple[str, tuple[str, ...]], ...]  # as text: "mlp=tp,fsdp; heads=" (an empty row)


def setting(default: Any, doc: str, *, low: float | None = None, below: float | None = None) -> Any:
    """A field with its meaning; `low` is the least value allowed, `below` a bound not reached."""
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "below": below})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    family: Literal["gpt"] = setting("gpt", "decoder-only transformer")
    n_layers: int = setting(4, "blocks", low=1)
    d_model: int = setting(128, "width of the residual stream", low=1)
    n_heads: int = setting(4, "query heads", low=1)
    n_kv_heads: int = setting(None, "key/value heads, GQA; None: n_heads", low=1)
    head_dim: int = setting(None, "size of a head; None: d_model / n_heads", low=1)
    d_mlp: int = setting(None, "hidden size of the feed-forward; None: 4 d_model", low=1)
    vocab_size: int = setting(2048, "the tokenizer's size; weights have 128 k rows", low=2)
    seq_len: int = setting(256, "context length, tokens", low=2)
    norm: Literal["layernorm", "rmsnorm"] = setting("layernorm", "norm before each block, and last")
    norm_eps: float = setting(1e-5, "added to the variance", low=0.0)
    positions: Literal["learned", "rotary", "none"] = setting(
        "learned", "how a token knows its place; none: by what it sees only"
    )
    rotary_base: float = setting(10000.0, "base of rotary frequencies", low=1.0)
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = setting(
        "none", "how rotary frequencies are slowed down for a context longer than trained on"
    )
    rope_factor: float = setting(1.0, "how much longer", low=1.0)
    rope_original_seq_len: int = setting(8192, "context trained on; llama3, yarn", low=1)
    rope_low: float = setting(1.0, "turns in that context up to which pairs are slowed down", low=0)
    rope_high: float = setting(4.0, "turns from which they are not; yarn's usual: 32", low=0)
    nope_every: int | None = setting(None, "every n-th layer does not rotate; None: all do", low=1)
    window: int | None = setting(
        None, "tokens a token looks back on, itself included; None: all", low=1
    )
    global_every: int | None = setting(
        None, "every n-th layer has no window; None: all have", low=2
    )
    activation: Literal["gelu", "gelu_exact", "squared_relu", "swiglu", "geglu"] = setting(
        "gelu", "gelu: tanh; exact: erf; swiglu and geglu have a gate"
    )
    parallel: bool = setting(False, "attention and feed-forward read the same norm (PaLM)")
    qk_norm: bool = setting(False, "norm of each head's query and key")
    attention_softcap: float = setting(0.0, "c tanh(s / c) of attention scores; 0: none", low=0.0)
    logit_softcap: float = setting(0.0, "the same of the logits; 0: none", low=0.0)
    attention: Literal["auto", "xla", "cudnn"] = setting(
        "auto", "kernel; auto: cudnn where it fits"
    )
    bias: bool = setting(True, "biases in linear layers")
    tied: bool = setting(True, "the output projection is the embedding table")
    dropout: float = setting(0.0, "share dropped: embedding, both block outputs", low=0, below=1)
    dtype: Literal["float32", "bfloat16", "float64"] = setting(
        "float32", "of matrix products; parameters stay float32 (float64 only with float64)"
    )
    embedding_scale: float = setting(1.0, "factor of the embeddings", low=0.0)
    residual_scale: float = setting(1.0, "factor of what a block adds", low=0.0)
    attention_scale: float | None = setting(
        None, "factor of q k; None: 1 / sqrt(head_dim); muP: 1 / head_dim", low=0.0
    )
    logit_scale: float = setting(1.0, "factor of the logits; muP: base width / width", low=0.0)
    init_std: float = setting(
        0.02, "of initial weights; residual projections / sqrt(2 n_layers)", low=0
    )

    def __post_init__(self):
        derived = {
            "n_kv_heads": self.n_heads,
            "head_dim": self.d_model // max(self.n_heads, 1),
            "d_mlp": 4 * self.d_model,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: vocab_size rounded up to 128, whatever the mesh."""
        return -(-self.vocab_size // 128) * 128

    @property
    def wide_dtype(self) -> str:
        """Of parameters, norms, softmax and loss."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate: three matrices instead of two."""
        return self.activation in ("swiglu", "geglu")

    @property
    def rope_length(self) -> float:
        """By how much yarn lengthens queries and keys (Peng et al. 2023, section 3.4)."""
        return 1 + 0.1 * math.log(self.rope_factor) if self.rope_scaling == "yarn" else 1.0

    @property
    def dims(self) -> dict[str, int]:
        """Sizes that a layout has to divide, by dim name."""
        return {
            "layer": self.n_layers, "embed": self.d_model, "heads": self.n_heads,
            "kv_heads": self.n_kv_heads, "attn_inner": self.n_heads * self.head_dim,
            "mlp": self.d_mlp, "mlp_inner": self.d_mlp, "vocab": self.padded_vocab,
            "vocab_in": self.padded_vocab, "seq": self.seq_len, "residual_seq": self.seq_len,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    preset: Literal["single", "dp", "fsdp", "tp", "tp_sp", "fsdp_tp"] | None = setting(
        None, "None: single on one device, else dp"
    )
    pp: int | None = setting(None, "pipeline stages", low=-1)
    dp: int | None = setting(None, "data parallel; -1 on one axis: the rest of the devices", low=-1)
    fsdp: int | None = setting(None, "data parallel with split weights (ZeRO-3)", low=-1)
    ep: int | None = setting(None, "expert parallel", low=-1)
    cp: int | None = setting(None, "context parallel", low=-1)
    tp: int | None = setting(None, "tensor parallel", low=-1)
    sequence_parallel: bool | None = setting(None, "split the residual stream over tp")
    zero: int = setting(0, "1: optimizer state and gradients split over dp", low=0, below=2)
    rules: Table = setting((), "rows of the table from dims to axes to replace: mlp=tp; vocab=")
    weights: Table = setting((), "dims of weights by a regex of their name: mlp.up=mlp,embed")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = setting(1000, "optimizer steps", low=1)
    global_batch_size: int = setting(16, "sequences a step, over all devices", low=1)
    accumulate: int = setting(1, "microbatches a step", low=1)
    seed: int = setting(0, "of initial weights, data order and dropout", low=0, below=2**32)
    log_every: int = setting(10, "steps between rows of metrics", low=1)
    eval_every: int = setting(100, "steps between evaluations; also at the end", low=1)
    eval_batches: int = setting(8, "batches of global_batch_size in an evaluation", low=1)
    remat: Literal["none", "selective", "full"] = setting(
        "none",
        "recompute in backward: selective keeps a block's matrix products, full only its input",
    )
    loss_chunks: int | None = setting(
        None, "parts of the sequence whose logits are held at once; None: fewest of 512 MiB", low=1
    )
    z_loss: float = setting(0.0, "weight of log(Z)^2 of the softmax in the objective", low=0.0)
    bad_steps_limit: int = setting(
        1, "non-finite steps in a row that end the run; fewer are left out", low=1
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = setting(
        "adamw", "update rule; muon: of the matrices in blocks, Adam for the rest"
    )
    lr: float = setting(1e-3, "peak learning rate; adafactor: times a weight's RMS", low=0.0)
    min_lr: float = setting(0.0, "at the end of the decay; inverse_sqrt: the least", low=0.0)
    matrix_lr_scale: float = setting(
        1.0, "matrices in blocks learn at this times the rate; muon: 10 is usual", low=0.0
    )
    embedding_lr_scale: float = setting(
        1.0, "tables of the embedding learn at this times the rate", low=0.0
    )
    head_lr_scale: float = setting(
        1.0, "an output projection of its own learns at this times the rate", low=0.0
    )
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = setting(
        "cosine", "after the warm-up; wsd: stays at lr, then decays"
    )
    warmup_steps: int = setting(0, "steps of linear warm-up from 0", low=0)
    decay_steps: int | None = setting(
        None, "steps until min_lr, warm-up included; None: steps", low=1
    )
    wsd_decay_steps: int | None = setting(None, "last of decay_steps, which decay (wsd)", low=1)
    wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = setting(
        "exponential", "over wsd_decay_steps: 2 * 0.5^x - 1, 1 - x, (1 + cos pi x) / 2, 1 - sqrt x"
    )
    b1: float = setting(0.9, "decay of Adam's first moment, of lion's mean", low=0.0, below=1.0)
    b2: float = setting(
        0.95, "decay of Adam's second moment, of lion's momentum", low=0.0, below=1.0
    )
    eps: float = setting(1e-8, "Adam's epsilon; muon's too", low=0.0)
    momentum: float = setting(0.9, "of sgd, of muon's matrices", low=0.0, below=1.0)
    moment_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of stored first moments (momentum); second moments stay float32"
    )
    weight_decay: float = setting(0.1, "decoupled; weights of two or more dims only", low=0.0)
    weight_decay_end: float | None = setting(None, "after train.steps; None: no change", low=0.0)
    weight_decay_schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "how weight_decay becomes weight_decay_end"
    )
    clip: float = setting(1.0, "largest global gradient norm; 0: no clipping", low=0.0)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str | None = setting(None, "prefix of PREFIX.bin and PREFIX.idx; None: built-in corpus")
    split: str = setting("969,30,1", "parts of the documents: train, validation, test")
    tokenizer: str | None = setting(
        None, "tokenizer.json or its folder; needed for text and bits a byte"
    )
    cross_document_attention: bool = setting(
        False,
        "packed documents attend to each other and positions run on, as in Megatron's default",
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = setting(200, "steps between checkpoints; also at the end", low=1)
    keep: int = setting(2, "newest checkpoints kept", low=1)


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    groups: bool = setting(
        False, "norms of gradients, updates and parameters, by weight and by layer"
    )
    activations: bool = setting(
        False, "mean |x|, root mean square and max |x| of block outputs, by layer, and of logits"
    )
    wandb: str | None = setting(None, "project at Weights & Biases to send curves to")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    layout: LayoutConfig = dataclasses.field(default_factory=LayoutConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)
    name: str = setting("run", "title of reports; the spec unless set")

    def to_dict(self) -> dict:
        """Nested plain values, as config.json has them."""
        return dataclasses.asdict(self)


def defaults() -> "ConfigDict":
    """A locked ConfigDict with every key there is: what a config file starts from."""
    from ml_collections import ConfigDict, config_dict

    def placeholder(field: dataclasses.Field) -> Any:
        kind = _kinds(field)[0]
        known = kind if kind in (int, float, bool, str) else object
        return config_dict.placeholder(known) if field.default in (None, ()) else field.default

    tree = {
        s: {f.name: placeholder(f) for f in dataclasses.fields(kind)}
        for s, kind in SECTIONS.items()
    }
    return ConfigDict({**tree, "name": config_dict.placeholder(str)}).lock()


def load_config(spec: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The run that a config file and overrides describe.

    spec       a shipped config, `gpt2:124m`, from any folder; or a file, `path/x.py:ARG`. A file is
               code: read a stranger's before you run it.
    overrides  {"model.n_layers": 2} or text, {"model.n_layers": "2"}, typed by the setting

    Raises ConfigError with every problem at once.
    """
    cfg = _read_spec(spec)
    problems = []
    for key, value in (overrides or {}).items():
        section, _, name = key.rpartition(".")
        if key not in KEYS:
            problems.append(_unknown(key))
            continue
        try:
            typed = _typed(value, KEYS[key])
        except ValueError as why:
            problems.append(f"{key}={value!r} is not {why}")
            continue
        group: Any = cfg[section] if section else cfg
        with cfg.unlocked(), cfg.ignore_type():  # references to this key (4 * d_model) follow
            group[name] = typed
    return from_dict({"name": str(spec)} | _set_values(cfg), problems)


def from_dict(values: Mapping[str, Any], problems: list[str] | None = None) -> RunConfig:
    """A RunConfig from nested plain values (config.json, a ConfigDict); missing keys take defaults.

    `problems` found before are reported together with those found here.
    """
    problems = list(problems or [])
    odd = [s for s in SECTIONS if not isinstance(values.get(s, {}), Mapping)]
    values = {key: value for key, value in values.items() if key not in odd}
    flat = {
        f"{section}.{name}" if section else name: value
        for section, group in [*((s, values.get(s, {})) for s in SECTIONS), ("", values)]
        for name, value in group.items()
        if section or name not in SECTIONS
    }
    problems += [_unknown(key) for key in flat if key not in KEYS]
    problems += [f"{s} is no group of settings" for s in odd]
    good, bad = {}, {problem.partition("=")[0] for problem in problems}
    for key in KEYS.keys() & flat.keys():
        try:
            good[key] = _typed(flat[key], KEYS[key])
            _in_range(good[key], KEYS[key].metadata)
        except ValueError as why:
            problems.append(f"{key}={flat[key]!r} is not {why}")
            bad.add(key)
    sections = {
        s: kind(
            **{
                k.rpartition(".")[2]: v
                for k, v in good.items()
                if k.startswith(s + ".") and k not in bad
            }
        )
        for s, kind in SECTIONS.items()
    }
    run = RunConfig(**sections, name=good.get("name", "run"))
    problems += [p for p in _misfits(run) if not any(f"{key}=" in p for key in bad)]
    if problems:
        many = f"{len(problems)} settings" if len(problems) > 1 else "a setting"
        raise ConfigError(f"{many} cannot be used:\n  " + "\n  ".join(sorted(set(problems))))
    return run


def _misfits(run: RunConfig) -> list[str]:
    """Settings that contradict each other, or that would do nothing."""
    m, t, d = run.model, run.train, run.data
    checks = [
        (m.head_dim == m.d_model // m.n_heads and m.d_model % m.n_heads,
         f"model.d_model={m.d_model} does not divide by model.n_heads={m.n_heads}; try n_heads"
         f" {_near_divisors(m.d_model, m.n_heads)}, or set model.head_dim"),
        (m.n_heads % m.n_kv_heads,
         f"model.n_kv_heads={m.n_kv_heads} does not divide model.n_heads={m.n_heads}; try"
         f" {_near_divisors(m.n_heads, m.n_kv_heads)}"),
        (m.positions == "rotary" and m.head_dim % 2,
         f"model.head_dim={m.head_dim} is odd; model.positions='rotary' rotates pairs"),
        *[(m.positions != "rotary" and getattr(m, key) != getattr(ModelConfig, key),
           f"model.{key}={getattr(m, key)} does nothing without model.positions='rotary'")
          for key in ("rotary_base", "rope_scaling", "nope_every")],
        (m.rope_scaling == "none" and m.rope_factor != 1.0,
         f"model.rope_factor={m.rope_factor} does nothing with model.rope_scaling='none'"),
        (m.rope_scaling != "none" and m.rope_factor == 1.0,
         f"model.rope_scaling={m.rope_scaling!r} does nothing with model.rope_factor=1; try 8"),
        *[(m.rope_scaling in ("none", "linear") and getattr(m, key) != getattr(ModelConfig, key),
           f"model.{key}={getattr(m, key)} does nothing with model.rope_scaling={m.rope_scaling!r}")
          for key in ("rope_original_seq_len", "rope_low", "rope_high")],
        (m.rope_low >= m.rope_high,
         f"model.rope_low={m.rope_low} is not below model.rope_high={m.rope_high}"),
        (m.global_every and not m.window,
         f"model.global_every={m.global_every} does nothing without model.window"),
        (m.window and m.window >= m.seq_len,
         f"model.window={m.window} does nothing in a context of model.seq_len={m.seq_len}"),
        *[(m.attention == "cudnn" and getattr(m, key),
           f"model.attention='cudnn' has no model.{key}={getattr(m, key)}; try 'auto'")
          for key in ("attention_softcap", "global_every")],
        (m.attention == "cudnn" and m.dtype != "bfloat16",
         f"model.attention='cudnn' does not compute in model.dtype={m.dtype!r}; try bfloat16"),
        (m.attention == "cudnn" and not d.cross_document_attention,
         "model.attention='cudnn' is given no mask between packed documents; try"
         " model.attention='auto', or data.cross_document_attention=True"),
        (t.global_batch_size % t.accumulate,
         f"train.global_batch_size={t.global_batch_size} does not divide by train.accumulate="
         f"{t.accumulate}; try accumulate {_near_divisors(t.global_batch_size, t.accumulate)}"),
        (d.path is None and d.tokenizer is not None,
         f"data.tokenizer={d.tokenizer!r} does nothing with the built-in corpus; set data.path"),
        (d.path is None and d.split != DataConfig.split,
         f"data.split={d.split!r} does nothing: the built-in corpus holds out files of its own"),
    ]  # fmt: skip
    return [message for wrong, message in checks if wrong] + _optimizer_misfits(run)


def _optimizer_misfits(run: RunConfig) -> list[str]:
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


def _typed(value: Any, field: dataclasses.Field) -> Any:
    """value, text or not, as the field's type. ValueError says what was expected."""
    kinds = _kinds(field)
    if types.NoneType in kinds and (value is None or str(value).lower() == "none"):
        return None
    kind = kinds[0]
    text = value.strip() if isinstance(value, str) else ""
    if kind is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool) or text.lower() in known:
            return value if isinstance(value, bool) else known[text.lower()]
        raise ValueError("true or false")
    if kind in (int, float):
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or number != number:
            raise ValueError("a whole number" if kind is int else "a number")
        if kind is int:
            if number in (float("inf"), float("-inf")) or number != int(number):
                raise ValueError("a whole number")
            return value if isinstance(value, int) else int(text) if _digits(text) else int(number)
        return number
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise ValueError(
            f"one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else "")
        )
    if kind is str:
        if isinstance(value, str) and value:  # empty: a variable of the shell that is not set
            return value
        raise ValueError("text")
    return _table(value)


def _table(value: Any) -> Table:
    """Rows from text, a mapping, or pairs: name -> names."""
    if value is None:
        return ()
    if isinstance(value, str):
        rows = [row.partition("=") for row in value.split(";") if row.strip()]
        if not all(equals for _, equals, _ in rows):
            raise ValueError("a table like 'mlp=tp,fsdp; heads='")
        value = [(name.strip(), names.split(",")) for name, _, names in rows]
    try:
        pairs = value.items() if hasattr(value, "items") else value
        rows = [(k, [v] if isinstance(v, str) else v) for k, v in pairs]
        return tuple((str(k), tuple(str(n).strip() for n in v if str(n).strip())) for k, v in rows)
    except (TypeError, ValueError):
        raise ValueError("a table from names to names, like {'mlp': ('tp', 'fsdp')}") from None


def _in_range(value: Any, metadata: Mapping[str, Any]) -> None:
    low, below = metadata.get("low"), metadata.get("below")
    if isinstance(value, int | float) and low is not None:
        if low == -1 and value in (0,):
            raise ValueError("a size of 1 or more, or -1 for the rest of the devices")
        if not (value >= low and value < (below if below is not None else float("inf"))):
            least = f"at least {low}" if low != -1 else "a size of 1 or more, or -1 for the rest"
            raise ValueError(least + (f" and below {below}" if below is not None else ""))


def takes(field: dataclasses.Field) -> str:
    """What a setting takes, for a person: 'int | None', 'layernorm | rmsnorm', 'table'."""
    names = {types.NoneType: ["None"], Table: ["table"]}
    return " | ".join(
        name
        for kind in dict.fromkeys(_kinds(field))
        for name in names.get(kind, typing.get_args(kind) or [getattr(kind, "__name__", "")])
    )


def _kinds(field: dataclasses.Field) -> tuple[Any, ...]:
    """(int, NoneType) for `int | None`, and for an `int` derived where it is None; else (int,)."""
    union = typing.get_origin(field.type) in (types.UnionType, typing.Union)
    kinds = typing.get_args(field.type) if union else (field.type,)
    return (*kinds, types.NoneType) if field.default is None else kinds


def _digits(text: str) -> bool:
    return text.lstrip("+-").replace("_", "").isdigit()


def _near_divisors(n: int, k: int) -> str:
    below = [d for d in range(1, min(math.isqrt(n), 10**6) + 1) if n % d == 0]
    divisors = sorted({*below, *(n // d for d in below)}, key=lambda d: (abs(d - k), d))
    return " or ".join(str(d) for d in sorted(divisors[:2]))


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, KEYS, n=2, cutoff=0.7)
    same_name = [k for k in KEYS if k.rpartition(".")[2] == key.rpartition(".")[2]]
    meant = list(dict.fromkeys(same_name + near))[:3]
    return f"{key} is no setting" + (f"; did you mean {' or '.join(meant)}?" if meant else "")


def _read_spec(spec: str | Path) -> "ConfigDict":
    name, _, arg = str(spec).partition(":")
    is_file = name.endswith(".py") or "/" in name
    path = Path(name) if is_file else shipped_configs() / f"{name}.py"
    if not os.path.isfile(path):  # which, unlike Path.is_file, takes any text
        shipped = sorted(p.stem for p in shipped_configs().glob("*.py"))
        near = difflib.get_close_matches(name.lower(), shipped, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"no config {name!r}; {hint}shipped: {', '.join(shipped)}")
    sizes: Any = ()
    try:
        module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        sizes = getattr(module, "SIZES", ())
        cfg = module.get_config(*([arg] if arg else []))
        _require_config(cfg)
        return cfg
    except (Exception, SystemExit) as why:  # whatever a config file, which is code, may raise
        has = f"; it has {', '.join(sizes)}" if sizes and isinstance(why, KeyError) else ""
        raise ConfigError(_where(path, why) + _what(why) + has) from why


def _require_config(cfg: Any) -> None:
    from ml_collections import ConfigDict

    if not all(type(part) is ConfigDict for part in (cfg, *(getattr(cfg, s, 0) for s in SECTIONS))):
        raise TypeError("get_config returns what mlm_jax.config.defaults() gives, with changes")


def _where(path: Path, why: BaseException) -> str:
    """'path, line 5: ', or without a line where none of this file was at work."""
    frames = traceback.extract_tb(why.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename) == path.absolute()]
    return f"{path}, line {lines[-1]}: " if lines else f"{path}: "


def _what(why: BaseException) -> str:
    """The error, without the list of every other key that ml_collections adds."""
    if near := re.search(r'Did you mean "(.*)" instead of "(.*)"', str(why)):
        return f"{near[2]} is no setting; did you mean {near[1]}?"
    return f"{type(why).__name__}: {str(why).partition(' and cannot be added')[0]}"


def shipped_configs() -> Path:
    """The folder of the configs that come with the package: inside a wheel, beside a checkout's."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def _set_values(cfg: "ConfigDict") -> dict:
    """A ConfigDict as nested dicts, without the Nones that mean 'not set'."""
    prune = lambda tree: {  # noqa: E731
        k: prune(v) if k in SECTIONS else v for k, v in tree.items() if v is not None
    }
    return prune(cfg.to_dict())


SECTIONS = {
    "model": ModelConfig, "layout": LayoutConfig, "train": TrainConfig,
    "optimizer": OptimizerConfig, "data": DataConfig, "checkpoint": CheckpointConfig,
    "watch": WatchConfig,
}  # fmt: skip
KEYS: dict[str, dataclasses.Field] = {
    f"{section}.{field.name}": field
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
} | {"name": {f.name: f for f in dataclasses.fields(RunConfig)}["name"]}
