"""Megatron-LM's flags of a whole run as settings, and the config file that these make."""

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from mlm_jax.checkpoint.megatron_args import (
    Translation,
    leftover,
    model_settings,
    of_script,
    vocabulary,
)  # fmt: skip
from mlm_jax.config import SECTIONS
from mlm_jax.door import from_dict
from mlm_jax.errors import ConfigError


def translate(script: str, gpus: int | None = None) -> Translation:
    """Settings of the run that a launch script, or a file of flags, starts. Runs nothing.

    gpus: over how many, where the script does not say.

    Raises ConfigError with every flag whose model cannot be built, and every setting that cannot be
    used.
    """
    flags, branches = of_script(script)
    t = Translation(flags)
    for branch in branches:
        t.lose(branch, "conditions and loops are not followed: all that stands inside was read")
    model_settings(t)
    if t.problems:
        raise ConfigError(_all("this model cannot be built here", t.problems))
    size = vocabulary(t)
    t.set("model.vocab_size", size, "vocab-size", "tokenizer-type")
    if size is None:
        t.lose("vocab-size", "not given; set model.vocab_size to the size of the tokenizer")
    t.set("model.dtype", "bfloat16" if t.on("bf16") or _narrow(t) else None, "bf16", "fp16")
    ways = _layout(t, gpus)
    steps, batch = _training(t, ways)
    _optimizer(t, steps, batch)
    _data(t)
    _records(t)
    leftover(t)
    if t.problems:
        raise ConfigError(_all("these flags cannot be carried over", t.problems))
    from_dict(t.nested())
    return t


def _all(what: str, problems: list[str]) -> str:
    return f"{what}:\n  " + "\n  ".join(problems)


def _narrow(t: Translation) -> bool:
    return any(flag in t.flags for flag in ("fp16", "fp8-format", "fp8-hybrid", "fp4-format"))


def _layout(t: Translation, gpus: int | None) -> int | None:
    """Sets the layout. How many ways the batch is split; None: nobody knows how many GPUs."""
    tp = t.number("tensor-model-parallel-size", t.number("model-parallel-size", 1))
    pp = t.number("pipeline-model-parallel-size", 1)
    cp = t.number("context-parallel-size", 1)
    for axis, size in (("tensor-model", tp), ("pipeline-model", pp), ("context", cp)):
        if not isinstance(size, int) or size < 1:
            t.problems.append(f"--{axis}-parallel-size {size}: a size of 1 or more is expected")
            return None
    t.set("layout.tp", tp if tp > 1 else None, "tensor-model-parallel-size", "model-parallel-size")
    t.set("layout.pp", pp if pp > 1 else None, "pipeline-model-parallel-size")
    t.set("layout.cp", cp if cp > 1 else None, "context-parallel-size")
    if t.on("sequence-parallel") and tp == 1:
        t.needless["sequence-parallel"] = "it does nothing without tensor parallelism"
    elif t.on("sequence-parallel"):
        t.set("layout.sequence_parallel", True, "sequence-parallel")
    if kind := t.text("cp-comm-type"):
        ours = {"p2p": "ring", "allgather": "all_gather"}.get(kind)
        if ours is None:
            t.lose("cp-comm-type", "keys and values go round in a ring")
        t.set("layout.cp_attention", ours if cp > 1 else None, "cp-comm-type")
    _chunks(t, pp)
    a_node, nodes = t.number("nproc-per-node"), t.number("nnodes", 1)
    if gpus is None and a_node and not (t.text("nnodes") is None and "nnodes" in t.flags):
        gpus = a_node * nodes
    if gpus is not None and gpus % (tp * pp * cp):
        t.problems.append(f"tp {tp} * pp {pp} * cp {cp} does not divide {gpus} GPUs")
        return None
    dp = gpus // (tp * pp * cp) if gpus else None
    stage = {"optim": 1, "optim_grads": 2, "optim_grads_params": 3}.get(
        t.text("data-parallel-sharding-strategy", "no_shard"), 0
    )
    stage = max(stage, 3 * t.on("use-torch-fsdp2"), 1 * t.on("use-distributed-optimizer"))
    whence = (
        "use-distributed-optimizer", "use-megatron-fsdp", "use-custom-fsdp", "use-torch-fsdp2",
        "data-parallel-sharding-strategy",
    )  # fmt: skip
    t.asked.update(whence)
    if dp is None:  # a preset takes the devices there are, and asks for nothing on one
        t.set("layout.preset", f"zero{stage}" if stage else None, *whence)
        return None
    t.set("layout.fsdp" if stage == 3 else "layout.dp", dp, "nproc-per-node", "nnodes")
    t.set("layout.zero", stage if stage in (1, 2) and dp > 1 else None, *whence)
    return dp


def _chunks(t: Translation, pp: int) -> None:
    flag, layers = "num-layers-per-virtual-pipeline-stage", t.number("num-layers")
    per = t.number(flag)
    parts = t.number("num-virtual-stages-per-pipeline-rank")
    if per and layers % (pp * per):
        t.problems.append(
            f"--{flag} {per}: does not divide the {layers} layers of {pp} stages evenly"
        )
    elif per:
        parts = layers // (pp * per)
    if parts and parts > 1 and pp > 1:
        t.set("layout.chunks", parts, flag, "num-virtual-stages-per-pipeline-rank")


def _training(t: Translation, ways: int | None) -> tuple[int | None, int | None]:
    """Sets everything under `train.`; steps, and sequences a step, where they are known."""
    micro, batch = t.number("micro-batch-size"), t.number("global-batch-size")
    if batch is None and micro and ways:
        batch = micro * ways  # as Megatron-LM does
    t.set("train.global_batch_size", batch, "global-batch-size")
    if batch is None:
        t.lose("global-batch-size", "not known; set train.global_batch_size")
    if micro and not ways:
        t.lose("micro-batch-size", "the number of GPUs is not known; say --gpus, or set"
               " train.accumulate to microbatches a step")  # fmt: skip
    elif micro and ways and batch and batch % (micro * ways):
        t.problems.append(
            f"--global-batch-size {batch} does not divide by --micro-batch-size {micro} on"
            f" {ways} data-parallel ranks"
        )
    elif micro and ways and batch:
        t.set("train.accumulate", batch // (micro * ways), "micro-batch-size")
    t.set("train.batch_schedule", t.text("step-batch-size-schedule"), "step-batch-size-schedule")
    steps, samples = t.number("train-iters"), t.number("train-samples")
    if steps is None and samples and batch:
        steps = samples // batch
    t.set("train.steps", steps, "train-iters", "train-samples")
    if steps is None:
        t.lose("train-iters", "not known; set train.steps")
    t.set("train.seed", t.number("seed", 1234), "seed")
    t.set("train.eval_every", t.number("eval-interval", 1000), "eval-interval")
    t.set("train.log_every", t.number("log-interval", 100), "log-interval")
    if (batches := t.number("eval-iters", 100)) == 0:
        t.lose("eval-iters", "a run is always evaluated, on train.eval_batches")
    t.set("train.eval_batches", batches or None, "eval-iters")
    kept = t.text("recompute-granularity")
    if t.on("recompute-activations"):
        kept = "selective"
    whole = ("checkpoint-activations", "activations-checkpoint-method")
    if any([t.on(flag) for flag in whole]):
        kept = "full"
    t.set("train.remat", kept, "recompute-granularity", "recompute-activations", *whole)
    method, some = t.text("recompute-method"), t.number("recompute-num-layers")
    if method == "block":
        t.lose("recompute-method", "all blocks are recomputed, not some of a stage")
    elif some and some > 1:
        t.lose("recompute-num-layers", "the input of each block is kept")
    return steps, batch


def _optimizer(t: Translation, steps: int | None, batch: int | None) -> None:
    name = t.text("optimizer", "adam")
    names = {"adam": "adamw", "sgd": "sgd", "muon": "muon", "dist_muon": "muon", "lion": "lion"}
    if name not in names:
        t.lose("optimizer", "adamw is used")
    ours = names.get(name, "adamw")
    t.set("optimizer.name", ours, "optimizer")
    t.set("optimizer.lr", t.number("lr"), "lr")
    if t.number("lr") is None:
        t.lose("lr", "not given; set optimizer.lr")
    if ours in ("adamw", "muon", "lion"):
        lion = ours == "lion"
        first, second = (f"lion-beta{i}" if lion else f"adam-beta{i}" for i in (1, 2))
        t.set("optimizer.b1", t.number(first, 0.95 if lion else 0.9), first)
        t.set("optimizer.b2", t.number(second, 0.98 if lion else 0.999), second)
    if ours in ("adamw", "muon"):
        t.set("optimizer.eps", t.number("adam-eps", 1e-8), "adam-eps")
    if ours in ("sgd", "muon"):
        t.set("optimizer.momentum", t.number(f"{ours}-momentum", 0.9), f"{ours}-momentum")
    if t.text("exp-avg-dtype", "fp32") == "bf16":
        t.set("optimizer.moment_dtype", "bfloat16", "exp-avg-dtype")
    t.asked.add("use-precision-aware-optimizer")
    t.set("optimizer.clip", t.number("clip-grad", 1.0), "clip-grad")
    if (apart := t.number("decoupled-lr")) and t.number("lr"):
        t.set("optimizer.embedding_lr_scale", apart / t.number("lr"), "decoupled-lr")
        if t.on("untie-embeddings-and-output-weights"):
            t.set("optimizer.head_lr_scale", apart / t.number("lr"), "decoupled-lr")
    _weight_decay(t)
    _schedule(t, steps, batch)


def _weight_decay(t: Translation) -> None:
    style, decay = t.text("weight-decay-incr-style", "constant"), t.number("weight-decay", 0.01)
    first, last = t.number("start-weight-decay", decay), t.number("end-weight-decay", decay)
    t.set("optimizer.weight_decay", first, "start-weight-decay", "weight-decay")
    if style != "constant" and first != last:
        t.set("optimizer.weight_decay_end", last, "end-weight-decay")
        t.set("optimizer.weight_decay_schedule", style, "weight-decay-incr-style")


def _schedule(t: Translation, steps: int | None, batch: int | None) -> None:
    def count(what: str) -> int | None:
        """Steps, which Megatron-LM may be told as sequences."""
        if (n := t.number(f"{what}-iters")) is not None:
            return n
        samples = t.number(f"{what}-samples")
        return samples // batch if samples and batch else None

    style = t.text("lr-decay-style", "linear")
    names = {"constant": "constant", "linear": "linear", "cosine": "cosine",
             "inverse-square-root": "inverse_sqrt", "WSD": "wsd"}  # fmt: skip
    if style not in names:
        t.lose("lr-decay-style", "linear is used")
    ours = names.get(style, "linear")
    t.set("optimizer.schedule", ours, "lr-decay-style")
    if t.number("min-lr", 0.0) and ours == "constant":
        t.needless["min-lr"] = "a constant rate never decays"
    else:
        t.set("optimizer.min_lr", t.number("min-lr", 0.0), "min-lr")
    decay, warm = count("lr-decay"), count("lr-warmup")
    whence = ("lr-decay-iters", "lr-decay-samples")
    if ours in ("constant", "inverse_sqrt"):
        t.needless |= {f: "this schedule has no last step" for f in whence if f in t.flags}
    elif decay != steps:
        t.set("optimizer.decay_steps", decay, *whence)
    share, total = t.number("lr-warmup-fraction"), decay or steps
    if share is not None and total:
        warm = round(share * total)
    t.set("optimizer.warmup_steps", warm, "lr-warmup-iters", "lr-warmup-samples",
          "lr-warmup-fraction")  # fmt: skip
    if ours == "wsd":
        last = ("lr-wsd-decay-iters", "lr-wsd-decay-samples")
        t.set("optimizer.wsd_decay_steps", count("lr-wsd-decay"), *last)
        t.set("optimizer.wsd_decay_style", t.text("lr-wsd-decay-style", "exponential"),
              "lr-wsd-decay-style")  # fmt: skip


def _data(t: Translation) -> None:
    reads = "train-data-path" if "train-data-path" in t.flags else "data-path"
    path, valid = t.text(reads), t.text("valid-data-path")
    t.set("data.path", path, reads)
    tokenizer = "tokenizer-model" if "tokenizer-model" in t.flags else "vocab-file"
    of_path = {
        "data.split": (t.text("split") and str(t.text("split")).replace(" ", ""), "split"),
        "data.valid_path": (valid, "valid-data-path"),
        "data.tokenizer": (t.text(tokenizer), tokenizer),
        "data.index_cache": (t.text("data-cache-path"), "data-cache-path"),
    }
    t.asked.add("merge-file")  # which stands beside the vocabulary
    if path and valid:
        of_path.pop("data.split")
    if path is None and reads not in t.lost:
        t.lose(reads, "not given; the built-in corpus is used until data.path is set")
    for key, (value, flag) in of_path.items():
        if path:
            t.set(key, value, flag)
        elif value:
            t.lose(flag, f"set it together with data.path: {key}={value!r}")
    if (kind := t.text("dataloader-type", "single")) != "single":
        t.lose("dataloader-type", f"samples come in one order, drawn once, not {kind}")
    apart = ("reset-attention-mask", "dataloader-inter-document-masking")
    is_apart = any([t.on(flag) for flag in apart])
    t.set("data.cross_document_attention", not is_apart, *apart)
    positions = t.settings.get("model.positions", ("learned", ""))[0]
    for flag, key in (
        ("reset-position-ids", "reset_positions"), ("eod-mask-loss", "eod_mask_loss")
    ):  # fmt: skip
        if t.on(flag) != is_apart and not (key == "reset_positions" and positions == "none"):
            t.set(f"data.{key}", t.on(flag), flag)
    t.set("data.epochs", "together")
    if t.on("fim-data") and (path is None or t.text(tokenizer)):
        t.set("data.objective", "fim", "fim-data")
        t.set("data.fim_rate", t.number("fim-rate", 0.5), "fim-rate")
        t.set("data.fim_spm_rate", t.number("fim-spm-rate", 0.5), "fim-spm-rate")
    elif t.on("fim-data"):
        t.lose("fim-data", "set data.objective='fim' together with data.tokenizer")


def _records(t: Translation) -> None:
    t.set("checkpoint.every", t.number("save-interval"), "save-interval")
    t.set("watch.wandb", t.text("wandb-project"), "wandb-project")
    t.set("watch.groups", t.on("log-params-norm"), "log-params-norm")
    for flag in ("pretrained-checkpoint", "load"):
        if flag in t.flags:
            t.lose(flag, "`mlm-jax convert from-megatron` makes a workdir W of such a folder; set"
                   " init_from=W to start from its weights")  # fmt: skip
    t.asked.add("finetune")


def config_text(t: Translation, script: str) -> str:
    """A config file, a document that begins with defaults() and says what did not come along."""
    name = "".join(c for c in script if c.isprintable() and c not in '"\\')
    lines = [
        f'"""Converted from {name}, a launch script of Megatron-LM.', "",
        "mlm-jax train --config THIS_FILE.py --workdir runs/a", '"""', "",
        "from mlm_jax.config import defaults", "", "", "def get_config():", "    cfg = defaults()",
    ]  # fmt: skip
    order = {
        f"{s}.{f.name}": None for s, kind in SECTIONS.items() for f in dataclasses.fields(kind)
    }
    for key in [key for key in order if key in t.settings]:
        value, whence = t.settings[key]
        shown = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
        lines.append(f"    cfg.{key} = {shown}  # {whence}")
    lines.append("    return cfg")
    for title, why_of in (
        ("What Megatron-LM would do, and this config does not", told(t, t.lost)),
        ("Flags of no use here", told(t, t.needless)),
    ):
        lines += ["", "", f"# {title}:"] if why_of else []
        for line in why_of:
            lines += textwrap.wrap(line, 98, initial_indent="#   ", subsequent_indent="#     ",
                                   break_on_hyphens=False)  # fmt: skip
    return "\n".join(lines) + "\n"


def told(t: Translation, why_of: Mapping[str, str]) -> list[str]:
    """Flags by the reason they share, a line each."""
    by_reason: dict[str, list[Any]] = {}
    for flag, why in why_of.items():
        name = flag if flag.startswith("line ") else t.shown(flag)
        by_reason.setdefault(why, []).append(name)
    return [f"{', '.join(flags)}: {why}" for why, flags in by_reason.items()]
