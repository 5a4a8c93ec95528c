"""Every setting, once: its key, default, unit and effect; without jax. `door` reads them."""

import dataclasses
import math
import types
import typing
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Table = tuple[tuple[str, tuple[str, ...]], ...]  # as text: "mlp=tp,fsdp; heads=" (an empty row)


def setting(default: Any, doc: str, *, low: float | None = None, below: float | None = None) -> Any:
    """A field with its meaning; `low` is the least value allowed, `below` a bound not reached."""
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "below": below})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    family: Literal["gpt", "bert", "t5"] = setting(
        "gpt", "gpt: decoder; bert: encoder; t5: encoder and decoder"
    )
    n_layers: int = setting(4, "blocks; t5: of the encoder", low=1)
    n_decoder_layers: int = setting(
        None, "blocks of a decoder beside an encoder; None: n_layers", low=1
    )
    d_model: int = setting(128, "width of the residual stream", low=1)
    n_heads: int = setting(4, "query heads", low=1)
    n_kv_heads: int = setting(None, "key/value heads, GQA; None: n_heads", low=1)
    head_dim: int = setting(None, "size of a head; None: d_model / n_heads", low=1)
    d_mlp: int = setting(None, "hidden size of the feed-forward; None: 4 d_model", low=1)
    vocab_size: int = setting(2048, "the tokenizer's size; weights have 128 k rows", low=2)
    seq_len: int = setting(256, "context length, tokens; t5: of the encoder", low=2)
    target_len: int = setting(None, "of a decoder beside an encoder; None: seq_len", low=2)
    norm: Literal["layernorm", "rmsnorm"] = setting("layernorm", "norm before each block, and last")
    norm_eps: float = setting(1e-5, "added to the variance", low=0.0)
    norm_placement: Literal["pre", "post", "both"] = setting(
        "pre",
        "what is normed: what a half of a block reads; post: the residual stream after it (BERT);"
        " both: what it reads, and what it gives (Gemma 2)",
    )
    norm_zero_centered: bool = setting(False, "norms are stored less 1 (Gemma, layernorm_1p)")
    positions: Literal["learned", "rotary", "relative", "none"] = setting(
        "learned", "how a token knows its place; relative: T5's; none: by what it sees only"
    )
    rotary_share: float = setting(1.0, "of a head's numbers that rotate, the first", low=0, below=2)
    rotary_base: float = setting(10000.0, "base of rotary frequencies", low=2.0)
    rotary_local_base: float | None = setting(
        None, "in layers with a window, without scaling (Gemma 3); None: rotary_base", low=2.0
    )
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = setting(
        "none", "how rotary frequencies are slowed down for a context longer than trained on"
    )
    rope_factor: float = setting(1.0, "how much longer", low=1.0)
    rope_original_seq_len: int = setting(8192, "context trained on; llama3, yarn", low=1)
    rope_low: float = setting(1.0, "turns in that context up to which pairs are slowed down", low=0)
    rope_high: float = setting(4.0, "turns from which they are not; yarn's usual: 32", low=0)
    nope_every: int | None = setting(None, "every n-th layer does not rotate; None: all do", low=2)
    window: int | None = setting(
        None, "tokens a token looks back on, itself included; None: all", low=1
    )
    global_every: int | None = setting(
        None, "every n-th layer has no window; None: all have", low=2
    )
    relative_buckets: int = setting(32, "of distances between tokens (relative)", low=4)
    relative_distance: int = setting(128, "tokens from which on all are one (relative)", low=8)
    activation: Literal["gelu", "gelu_exact", "relu", "squared_relu", "swiglu", "geglu"] = setting(
        "gelu", "gelu: tanh; exact: erf; swiglu and geglu have a gate"
    )
    parallel: bool = setting(False, "attention and feed-forward read the same input (PaLM)")
    parallel_norms: int = setting(
        1,
        "of a parallel block; 2: one for attention, one for feed-forward (GPT-NeoX)",
        low=1,
        below=3,
    )
    qk_norm: bool = setting(False, "norm of each head's query and key")
    attention_softcap: float = setting(0.0, "c tanh(s / c) of attention scores; 0: none", low=0.0)
    logit_softcap: float = setting(0.0, "the same of the logits; 0: none", low=0.0)
    attention: Literal["auto", "xla", "cudnn"] = setting(
        "auto", "kernel; auto: cudnn where it fits"
    )
    bias: bool = setting(True, "biases in linear layers and norms")
    qkv_bias: bool = setting(None, "of queries, keys and values; None: bias")
    o_bias: bool = setting(None, "of attention's output; None: bias")
    mlp_bias: bool = setting(None, "of feed-forwards; None: bias")
    norm_bias: bool = setting(None, "of layernorm; None: bias")
    tied: bool = setting(True, "the output projection is the embedding table")
    token_types: int = setting(0, "kinds of token that have a vector each: BERT's segments", low=0)
    embedding_norm: bool = setting(False, "norm of the embeddings, before the first block")
    mlm_head: bool = setting(True, "bert: layer, norm and bias before the logits of hidden words")
    pooler: bool = setting(True, "bert: layer that reads the first token of a text")
    order_head: bool = setting(True, "bert: tells by the pooler if two segments are in order")
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
            "n_decoder_layers": self.n_layers,
            "target_len": self.seq_len,
            **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "norm_bias"), self.bias),
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
    def causal(self) -> bool:
        """Whether a token sees only itself and what comes before it."""
        return self.family != "bert"

    @property
    def seq2seq(self) -> bool:
        """Whether an encoder reads one text, and a decoder writes another."""
        return self.family == "t5"

    @property
    def rotary_dim(self) -> int:
        """How many of a head's numbers rotate."""
        return int(self.head_dim * self.rotary_share)

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
    preset: (
        Literal[
            "single", "dp", "zero1", "zero2", "zero3", "fsdp", "hybrid", "tp", "tp_sp", "fsdp_tp"
        ]
        | None
    ) = setting(None, "None: single on one device, else dp; hybrid: fsdp in a node, dp across")
    pp: int | None = setting(None, "pipeline stages", low=-1)
    dp: int | None = setting(None, "data parallel; -1 on one axis: the rest of the devices", low=-1)
    fsdp: int | None = setting(None, "data parallel with split weights (ZeRO-3)", low=-1)
    ep: int | None = setting(None, "expert parallel", low=-1)
    cp: int | None = setting(None, "context parallel", low=-1)
    tp: int | None = setting(None, "tensor parallel", low=-1)
    sequence_parallel: bool | None = setting(None, "split the residual stream over tp")
    zero: int | None = setting(
        None,
        "1: optimizer state split over dp, 2: gradients of accumulated microbatches too; 3 is fsdp;"
        " None: 0, or the preset's",
        low=0,
        below=4,
    )
    pipeline: Literal["gpipe", "circular", "1f1b"] | None = setting(
        None, "order of the work of pp stages; None: 1f1b"
    )
    chunks: int | None = setting(
        None, "parts of the model on a stage; more make it wait less (circular, 1f1b)", low=1
    )
    cp_attention: Literal["ring", "all_gather"] | None = setting(
        None, "how keys and values go round under cp; None: ring"
    )
    rules: Table = setting((), "rows of the table from dims to axes to replace: mlp=tp; vocab=")
    weights: Table = setting((), "dims of weights by a regex of their name: mlp.up=mlp,embed")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = setting(1000, "optimizer steps", low=1)
    global_batch_size: int = setting(16, "sequences a step, over all devices", low=1)
    accumulate: int = setting(1, "microbatches a step", low=1)
    batch_schedule: str | None = setting(
        None,
        "global batch size by tokens seen, '0:32 1B:64 10B:256', the last: global_batch_size;"
        " schedules of the optimizer then count steps of that one",
    )
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
    xla: Literal["default", "overlap", "overlap_large"] = setting(
        "default", "flags of XLA for GPUs, host.XLA_PRESETS: communication beside computation"
    )
    bad_steps_limit: int = setting(
        1, "non-finite steps in a row that end the run; fewer are left out", low=1
    )
    hang_seconds: float = setting(
        600.0,
        "several processes: seconds that one may stay where it is; then it is named, and all end",
        low=1,
    )

    @property
    def microbatch(self) -> int:
        """Sequences of a microbatch."""
        return self.global_batch_size // self.accumulate

    def microbatches(self, sequences: int) -> int:
        """Into how many a batch of this size is cut; one smaller than a microbatch is one."""
        return max(sequences // self.microbatch, 1)


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
    path: str | None = setting(
        None,
        "PREFIX of .bin and .idx, a blend '0.7 A 0.3 B' or 'A B', a .json or .txt file with one;"
        " chat, pairs: .jsonl; None: a built-in corpus",
    )
    valid_path: str | None = setting(None, "the same for validation; None: by split from path")
    builtin: Literal["python", "prose", "conversations", "en-fr", "en-de", "sentences"] | None = (
        setting(
            None,
            "corpus where path is None; None: python; chat: conversations; pairs: en-fr; masked:"
            " sentences",
        )
    )
    objective: Literal["causal", "fim", "chat", "pairs", "masked", "spans"] = setting(
        None,
        "what is predicted: all tokens; fim: middles too; chat: assistant turns; pairs: targets;"
        " masked: hidden words, and the order of sentences (bert); spans: those taken out of a text"
        " (t5); None: causal, masked or spans, by model.family",
    )
    split: str = setting("969,30,1", "parts of the documents: train, validation, test")
    tokenizer: str | None = setting(
        None, "tokenizer.json, a folder or another tokenizer's file; for text and bits a byte"
    )
    cross_document_attention: bool = setting(
        False,
        "packed documents attend to each other and positions run on, as in Megatron's default",
    )
    reset_positions: bool | None = setting(
        None, "positions begin at 0 in each document; None: where these are kept apart"
    )
    eod_mask_loss: bool | None = setting(
        None, "no loss where one document ends and the next begins; None: where kept apart"
    )
    prompt: str = setting("{source}\n", "what stands before the target (pairs)")
    fim_rate: float = setting(0.5, "share of documents rearranged (fim)", low=0.0)
    fim_spm_rate: float = setting(0.5, "share of these with the suffix first (fim)", low=0.0)
    fim_tokens: str | None = setting(
        None, "names: 'prefix,middle,suffix,pad' (fim); None: those that code models use"
    )
    epochs: Literal["apart", "together"] = setting(
        "apart",
        "together: all epochs of train.steps shuffled at once, as Megatron-LM does; apart: one by"
        " one, so that the order does not depend on train.steps",
    )
    index_cache: str | None = setting(
        None, "folder of sample indices, shared by all processes; None: in the user's cache"
    )
    workers: int = setting(0, "processes that read ahead; 0: a thread", low=0)

    @property
    def apart(self) -> bool:
        """Whether packed documents are kept from attending to each other."""
        return not self.cross_document_attention

    @property
    def resets_positions(self) -> bool:
        return self.apart if self.reset_positions is None else self.reset_positions

    @property
    def masks_boundaries(self) -> bool:
        return self.apart if self.eod_mask_loss is None else self.eod_mask_loss


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
        False, "mean |x|, root mean square and max |x| of block outputs by layer, and of the last"
    )
    wandb: str | None = setting(None, "project at Weights & Biases to send curves to")


OBJECTIVES = {  # of each family, the usual one first
    "gpt": ("causal", "fim", "chat", "pairs"), "bert": ("masked",), "t5": ("spans", "pairs"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunConfig:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    layout: LayoutConfig = dataclasses.field(default_factory=LayoutConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)
    init_from: str | None = setting(
        None, "first weights: a run's folder, or one of Hugging Face's; None: random by train.seed"
    )
    name: str = setting("run", "title of reports; the spec unless set")

    def __post_init__(self):
        if self.data.objective is None:
            usual = OBJECTIVES[self.model.family][0]
            object.__setattr__(self, "data", dataclasses.replace(self.data, objective=usual))

    def to_dict(self) -> dict:
        """Nested plain values, as config.json has them."""
        return dataclasses.asdict(self)


def defaults() -> "ConfigDict":
    """A locked ConfigDict with every key there is: what a config file starts from."""
    from ml_collections import ConfigDict, config_dict

    def placeholder(field: dataclasses.Field) -> Any:
        kind = kinds_of(field)[0]
        known = kind if kind in (int, float, bool, str) else object
        return config_dict.placeholder(known) if field.default in (None, ()) else field.default

    tree = {
        s: {f.name: placeholder(f) for f in dataclasses.fields(kind)}
        for s, kind in SECTIONS.items()
    }
    loose = {key: config_dict.placeholder(str) for key in KEYS if "." not in key}
    return ConfigDict({**tree, **loose}).lock()


def takes(field: dataclasses.Field) -> str:
    """What a setting takes, for a person: 'int | None', 'layernorm | rmsnorm', 'table'."""
    names = {types.NoneType: ["None"], Table: ["table"]}
    return " | ".join(
        name
        for kind in dict.fromkeys(kinds_of(field))
        for name in names.get(kind, typing.get_args(kind) or [getattr(kind, "__name__", "")])
    )


def kinds_of(field: dataclasses.Field) -> tuple[Any, ...]:
    """(int, NoneType) for `int | None`, and for an `int` derived where it is None; else (int,)."""
    union = typing.get_origin(field.type) in (types.UnionType, typing.Union)
    kinds = typing.get_args(field.type) if union else (field.type,)
    return (*kinds, types.NoneType) if field.default is None else kinds


SECTIONS = {
    "model": ModelConfig, "layout": LayoutConfig, "train": TrainConfig,
    "optimizer": OptimizerConfig, "data": DataConfig, "checkpoint": CheckpointConfig,
    "watch": WatchConfig,
}  # fmt: skip
KEYS: dict[str, dataclasses.Field] = {
    f"{section}.{field.name}": field
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
} | {f.name: f for f in dataclasses.fields(RunConfig) if f.name not in SECTIONS}
