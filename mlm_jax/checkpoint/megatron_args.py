"""Megatron-LM's flags, from a launch script or a checkpoint, as settings of ours.

What Megatron-LM does where a flag is not given counts too: a model has its dropout of 0.1 then.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from mlm_jax.checkpoint.megatron_flags import IMPOSSIBLE, LAUNCHES, LOST, PREFIXES, WHY_NEEDLESS
from mlm_jax.checkpoint.megatron_script import UNKNOWN, Script
from mlm_jax.config import KEYS
from mlm_jax.errors import ConfigError

SIZES = ("num-layers", "hidden-size", "num-attention-heads", "seq-length")
Flags = dict[str, Any]  # by name without dashes in front; True of one without a value
SHELL = "only whoever starts the script knows it"


@dataclasses.dataclass
class Translation:
    """Flags on their way to settings. Reading one marks it as carried over."""

    flags: Flags
    settings: dict[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)  # and whence
    lost: dict[str, str] = dataclasses.field(default_factory=dict)  # flag: why
    needless: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    asked: set[str] = dataclasses.field(default_factory=set)

    def text(self, flag: str, default: Any = None) -> Any:
        """A flag's value; None or the default where it is not given, or only a shell knows it."""
        self.asked.add(flag)
        value = self.flags.get(flag)
        if value is None or (isinstance(value, str) and UNKNOWN in value):
            return default
        return value

    def number(self, flag: str, default: Any = None) -> Any:
        value = self.text(flag, default)
        if isinstance(value, str | bool):
            text = str(value)
            try:
                value = int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                self.problems.append(f"--{flag} {text}: a number is expected")
                return default
        return value

    def on(self, flag: str) -> bool:
        return bool(self.text(flag, False))

    def set(self, key: str, value: Any, *flags: str) -> None:
        """A setting that comes from these flags, unless it is the default anyway."""
        for flag in flags:
            if UNKNOWN in str(self.flags.get(flag, "")):
                self.lose(flag, f"{SHELL}; set {key}")
        if value is not None and value != KEYS[key].default:
            given = [f"--{flag}" for flag in flags if flag in self.flags]
            self.settings[key] = value, ", ".join(given) or "Megatron-LM's default"

    def lose(self, flag: str, why: str) -> None:
        self.lost[flag] = why

    def shown(self, flag: str) -> str:
        value = self.flags.get(flag)
        words = f"--{flag}" if value in (None, True) else f"--{flag} {value}"
        return " ".join(words.replace(UNKNOWN, "").split())

    def nested(self) -> dict[str, dict[str, Any]]:
        """As door.from_dict takes them."""
        tree: dict[str, dict[str, Any]] = {}
        for key, (value, _) in self.settings.items():
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = value
        return tree


def model_settings(t: Translation) -> None:
    """Everything under `model.` but its vocabulary and its dtype."""
    t.problems += [
        f"{t.shown(flag)}: {why}"
        for flag, why in IMPOSSIBLE.items()
        if t.flags.get(flag) not in (None, False, 0, "0", "0.0", "")
    ]
    t.asked.update(IMPOSSIBLE)
    layers, width, heads, length = (
        t.number(flag) for flag in SIZES
    )  # fmt: skip
    if missing := [f"--{flag}" for flag in SIZES if not t.number(flag)]:
        taken = " (--use-checkpoint-args has them read there)" * t.on("use-checkpoint-args")
        t.problems.append(f"{', '.join(missing)}: needed, and not given{taken}")
        return
    t.set("model.n_layers", layers, "num-layers")
    t.set("model.d_model", width, "hidden-size")
    t.set("model.n_heads", heads, "num-attention-heads")
    t.set("model.seq_len", length, "seq-length")
    if t.on("group-query-attention") and (groups := t.number("num-query-groups", 1)) != heads:
        t.set("model.n_kv_heads", groups, "group-query-attention", "num-query-groups")
    elif t.text("num-query-groups") is not None:
        t.needless["num-query-groups"] = "it does nothing without --group-query-attention"
    if (channels := t.number("kv-channels", width // heads)) != width // heads:
        t.set("model.head_dim", channels, "kv-channels")
    gated = t.on("swiglu")
    usual = int((4 * width * 2 / 3) / 64) * 64 if gated else 4 * width
    if (inner := t.number("ffn-hidden-size", usual)) != 4 * width:
        t.set(
            "model.d_mlp", inner, *(["ffn-hidden-size"] * ("ffn-hidden-size" in t.flags)), "swiglu"
        )
    _shape_of_blocks(t, gated)
    _positions(t)
    _window(t, length)


def _shape_of_blocks(t: Translation, gated: bool) -> None:
    no_bias, exact = t.on("disable-bias-linear"), t.on("no-bias-gelu-fusion")
    if gated:
        t.set("model.activation", "swiglu", "swiglu")
    elif t.on("squared-relu"):
        t.set("model.activation", "squared_relu", "squared-relu")
    elif no_bias or exact:  # without its fused kernel Megatron-LM takes torch's exact GELU
        t.set("model.activation", "gelu_exact", "disable-bias-linear", "no-bias-gelu-fusion")
    norm = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}.get(
        kind := t.text("normalization", "LayerNorm")
    )
    if norm is None:
        t.problems.append(f"--normalization {kind}: there are LayerNorm and RMSNorm")
    t.set("model.norm", norm, "normalization")
    eps = "layernorm-epsilon" if "layernorm-epsilon" in t.flags else "norm-epsilon"
    t.set("model.norm_eps", t.number(eps, 1e-5), eps)
    t.set("model.norm_zero_centered", t.on("apply-layernorm-1p"), "apply-layernorm-1p")
    t.set("model.qk_norm", t.on("qk-layernorm"), "qk-layernorm")
    t.set("model.attention_scale", t.number("softmax-scale"), "softmax-scale")
    if no_bias:
        t.set("model.bias", False, "disable-bias-linear")
        t.set("model.qkv_bias", t.on("add-qkv-bias") or None, "add-qkv-bias")
        if norm == "layernorm":
            t.set("model.norm_bias", True, "normalization")
    else:
        t.text("add-qkv-bias")
    untied = t.on("untie-embeddings-and-output-weights")
    t.set("model.tied", not untied, "untie-embeddings-and-output-weights")
    t.set("model.init_std", t.number("init-method-std", 0.02), "init-method-std")
    t.set("model.dropout", t.number("hidden-dropout", 0.1), "hidden-dropout")
    if dropped := t.number("attention-dropout", 0.1):
        default = "" if "attention-dropout" in t.flags else f" {dropped} (its default)"
        t.lose("attention-dropout" + default, "attention's probabilities are not dropped here")
    if (kind := t.text("softmax-type", "vanilla")) != "vanilla":
        t.problems.append(f"--softmax-type {kind}: there is the plain softmax")


def _positions(t: Translation) -> None:
    kind = t.text("position-embedding-type", "learned_absolute")
    flag = "position-embedding-type"
    if t.on("use-rotary-position-embeddings"):
        kind, flag = "rope", "use-rotary-position-embeddings"
    if t.on("no-position-embedding") and kind == "learned_absolute":
        kind, flag = "none", "no-position-embedding"
    known = {"learned_absolute": "learned", "rope": "rotary", "none": "none"}
    if kind not in known:
        t.problems.append(f"--{flag} {kind}: there are {', '.join(known)}")
    t.set("model.positions", known.get(kind), flag)
    rows, length = t.number("max-position-embeddings"), t.number("seq-length")
    if rows and rows != length and kind == "learned_absolute":
        t.lose("max-position-embeddings", f"the table has a row for each of model.seq_len={length}")
    share = "rotary-percent"
    of_rotary = (
        "rotary-base", share, "use-rope-scaling", "rope-scaling-factor", "no-rope-freq",
        "rotary-seq-len-interpolation-factor",
    )  # fmt: skip
    base, percent, scaled, factor, every, stretch = (t.text(flag) for flag in of_rotary)
    if kind != "rope":
        for flag in of_rotary:
            if flag in t.flags:
                t.needless[flag] = "it does nothing without --position-embedding-type rope"
        return
    t.set("model.rotary_base", t.number("rotary-base", 10000) if base else None, "rotary-base")
    t.set("model.rotary_share", t.number(share) if percent else None, share)
    if scaled:
        t.set("model.rope_scaling", "llama3", "use-rope-scaling")
        t.set("model.rope_factor", t.number("rope-scaling-factor", 8.0), "rope-scaling-factor")
    elif factor:
        t.needless["rope-scaling-factor"] = "it does nothing without --use-rope-scaling"
    if stretch and t.number("rotary-seq-len-interpolation-factor") != 1:
        key, flag = "model.rope_scaling", "rotary-seq-len-interpolation-factor"
        if scaled:
            t.problems.append(f"{t.shown(flag)}: not together with --use-rope-scaling")
        t.set(key, "linear", flag)
        t.set("model.rope_factor", t.number(flag), flag)
    if every and not re.fullmatch(r"\d+", str(every)):
        t.problems.append(f"{t.shown('no-rope-freq')}: only every n-th layer may be without")
    elif every:
        t.set("model.nope_every", t.number("no-rope-freq"), "no-rope-freq")


def _window(t: Translation, length: int) -> None:
    size, skip = t.text("window-size"), t.text("window-attn-skip-freq")
    if size is None:
        return
    left = int(re.findall(r"-?\d+", str(size))[0]) if re.search(r"\d", str(size)) else None
    if left is None:
        t.problems.append(f"{t.shown('window-size')}: two numbers are expected")
    elif left < 0 or left + 1 >= length:
        t.needless["window-size"] = "the window holds the whole context"
    else:  # Megatron-LM counts the tokens before, ours the token itself too
        t.set("model.window", left + 1, "window-size")
        if skip is not None and not re.fullmatch(r"\d+", str(skip)):
            t.problems.append(f"{t.shown('window-attn-skip-freq')}: only every n-th layer may skip")
        elif skip is not None:
            t.set("model.global_every", int(skip), "window-attn-skip-freq")


def vocabulary(t: Translation) -> int | None:
    """The true size, without padding, of the tokenizer that the flags name; None: unknown."""
    kind, size = t.text("tokenizer-type"), t.number("vocab-size")
    if size:
        return size + 1 if str(kind).startswith("Null") else size  # and its end of a document
    return 50257 if kind == "GPT2BPETokenizer" or "merge-file" in t.flags else None


def of_namespace(values: Mapping[str, Any]) -> Flags:
    """Flags from the arguments that a checkpoint keeps, which are named by what they mean."""
    turned = {"add-bias-linear": "disable-bias-linear", "bias-gelu-fusion": "no-bias-gelu-fusion",
              "add-position-embedding": "no-position-embedding"}  # fmt: skip
    named = {name.replace("_", "-"): value for name, value in values.items()}
    flags = {name: v for name, v in named.items() if v is not None and v is not False}
    return flags | {flag: True for name, flag in turned.items() if named.get(name) is False}


def of_script(text: str) -> tuple[Flags, list[str]]:
    """Flags of the command that starts training, and of torchrun those that count GPUs.

    Raises ConfigError where a script starts nothing, or another model.
    """
    script = Script(text)
    best: tuple[list[str], list[str]] = [], []
    loose = []  # of a file of arguments
    for _, words in script.commands:
        words = [
            part for w in words for part in (re.findall(r"[^ \t\n]+", w) if " --" in w else [w])
        ]
        starts = [i for i, w in enumerate(words) if w.endswith(".py")]
        if starts and len(words) - starts[0] > len(best[1]):
            best = words[: starts[0]], words[starts[0] :]
        elif not starts and words[0].startswith("--"):
            loose += words
    launcher, words = best if best[1] else ([], ["", *loose])
    if not any(w.startswith("--") for w in words):
        raise ConfigError(
            "no flags of Megatron-LM here: neither a command like `torchrun ... pretrain_gpt.py"
            " --num-layers 12 ...` nor lines of flags"
        )
    started = words[0].rpartition("/")[2].removesuffix(".py")
    for name, what in LAUNCHES.items():
        if name in re.split(r"[_-]", started):
            raise ConfigError(
                f"{words[0].replace(UNKNOWN, '')} trains {what}; flags of pretrain_gpt.py are"
                " converted"
            )
    counts = {k: v for k, v in _parsed(launcher).items() if k in ("nproc-per-node", "nnodes")}
    return _parsed(words[1:]) | counts, script.branches


def _parsed(words: list[str]) -> Flags:
    flags: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = flags[name.replace("_", "-")] = [value] if equals else []
        else:
            values.append(word)
    return {name: " ".join(values) if values else True for name, values in flags.items()}


def leftover(t: Translation) -> None:
    """Sorts flags that nobody asked for into lost and needless."""
    for flag, value in t.flags.items():
        prefix = next((p for p in PREFIXES if flag.startswith(p)), None)
        if flag in t.lost or flag in t.needless:
            continue
        if flag in WHY_NEEDLESS:
            t.needless[flag] = WHY_NEEDLESS[flag]
        elif flag in LOST:
            t.lose(flag, LOST[flag])
        elif UNKNOWN in str(value):
            t.lose(flag, SHELL)
        elif flag not in t.asked:
            t.lose(flag, PREFIXES[prefix] if prefix else "a flag without a counterpart here")
