"""What the config.json files of many makes have in common: sizes, rotary bases, windows.

Each `read_` takes Settings and gives nouns of ModelConfig; the `write_` beside it is its inverse.
Read are the form of transformers 5 (rope_parameters, dtype, layer_types) and the older ones;
written are both, where they differ.
"""

from collections.abc import Collection, Mapping
from typing import Any

from mlm_jax.config import ModelConfig

Nouns = dict[str, Any]

ACTIVATIONS = {  # their names, the one that is written first
    "gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "gelu_exact": ("gelu",),
    "relu": ("relu",),
    "squared_relu": ("relu2",),
}
GATED = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")}
SLIDING, FULL = "sliding_attention", "full_attention"


class Settings:
    """A config.json, and what is wrong with it as far as it was read.

    tensors: the names in the files beside it, without a head that only repeats the table.
    """

    def __init__(self, values: Mapping[str, Any], tensors: Collection[str] = ()):
        self.values, self.tensors = values, tensors
        self.problems: list[str] = []

    def need(self, *keys: str) -> Any:
        """The first of these that there is; 1 where there is none, and a problem."""
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        self.problems.append(f"it has no {' or '.join(keys)}")
        return 1

    def get(self, key: str, default: Any) -> Any:
        return self.values.get(key, default)

    def given(self, key: str, default: Any) -> Any:
        """The same, where null is none."""
        value = self.values.get(key)
        return default if value is None else value

    def only(self, key: str, *allowed: Any) -> None:
        """A key that may be left out, or say this."""
        value = self.values.get(key, allowed[0])
        if value not in allowed:
            self.refuse(key, value, f"only {' or '.join(map(repr, allowed))} can be built here")

    def refuse(self, key: str, value: Any, why: str) -> None:
        self.problems.append(f"{key}={value!r}: {why}")

    def says_tied(self, default: bool) -> bool:
        return self.given("tie_word_embeddings", default)

    def tied(self, default: bool, head: str = "lm_head.weight") -> bool:
        """Whether the table is the head: not where there is another, as in transformers 5."""
        return self.says_tied(default) and head not in self.tensors

    def activation(self, key: str, default: str, table: Mapping[str, tuple[str, ...]]) -> str:
        value = self.given(key, default)
        for ours, theirs in table.items():
            if value in theirs:
                return ours
        known = ", ".join(name for theirs in table.values() for name in theirs)
        self.refuse(key, value, f"there are {known}")
        return next(iter(table))


def read_sizes(s: Settings, n_kv_heads: int | None = None, head_dim: int | None = None) -> Nouns:
    """n_kv_heads, head_dim: what the make has where they are left out; None: derived."""
    kv_heads = s.get("num_key_value_heads", n_kv_heads)
    return {
        "vocab_size": s.need("vocab_size"), "d_model": s.need("hidden_size"),
        "d_mlp": s.need("intermediate_size"), "n_layers": s.need("num_hidden_layers"),
        "n_heads": s.need("num_attention_heads"), "n_kv_heads": kv_heads,
        "head_dim": s.get("head_dim", head_dim), "seq_len": s.need("max_position_embeddings"),
    }  # fmt: skip


def write_sizes(m: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": m.vocab_size, "hidden_size": m.d_model, "intermediate_size": m.d_mlp,
        "num_hidden_layers": m.n_layers, "num_attention_heads": m.n_heads,
        "num_key_value_heads": m.n_kv_heads, "head_dim": m.head_dim,
        "max_position_embeddings": m.seq_len,
    }  # fmt: skip


def theirs(activation: str, table: Mapping[str, tuple[str, ...]]) -> str | None:
    return table[activation][0] if activation in table else None


def read_rotary(
    s: Settings, base: float = 10000.0, share: float = 1.0, *, nested: str | None = None,
    base_key: str = "rope_theta", share_key: str = "partial_rotary_factor",
) -> Nouns:  # fmt: skip
    """Base, share of a head and scaling. nested: the kind of layer that rope_parameters are of."""
    new = s.given("rope_parameters", {})
    new = new.get(nested) or {} if nested in new or (nested and SLIDING in new) else new
    scaling = new or s.given("rope_scaling", {})
    nouns = {
        "positions": "rotary",
        "rotary_base": new.get("rope_theta", s.given(base_key, base)),
        "rotary_share": new.get("partial_rotary_factor", s.given(share_key, share)),
    }
    if share == 1 and nouns["rotary_share"] != 1:  # which transformers has no ear for there
        s.refuse("partial_rotary_factor", nouns["rotary_share"], "only 1 can be built here")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        s.refuse("rope_type", kind, "there are default, linear, llama3 and yarn")
        return nouns
    if kind == "default" or scaling.get("factor") == 1:
        return nouns
    nouns |= {"rope_scaling": kind, "rope_factor": scaling["factor"]}
    if kind == "linear":
        return nouns
    names = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else (
        "beta_slow", "beta_fast")  # fmt: skip
    usual = (1.0, 4.0) if kind == "llama3" else (1.0, 32.0)
    for noun, name, default in zip(("rope_low", "rope_high"), names, usual, strict=True):
        nouns[noun] = scaling.get(name) or default
    nouns["rope_original_seq_len"] = scaling.get("original_max_position_embeddings") or s.given(
        "original_max_position_embeddings", s.get("max_position_embeddings", None)
    )
    if kind == "yarn":
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            if scaling.get(key) is not None:
                s.refuse(f"rope {key}", scaling[key], "yarn's own is 0.1 ln(factor) + 1")
        if not scaling.get("truncate", True):
            s.refuse("rope truncate", False, "only True can be built here")
    return nouns


def write_rotary(m: ModelConfig) -> dict[str, Any]:
    """rope_parameters, and rope_theta and rope_scaling for older readers."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if m.rope_scaling != "none":
        scaling = {"rope_type": m.rope_scaling, "factor": m.rope_factor}
    if m.rope_scaling in ("llama3", "yarn"):
        llama3 = {"low_freq_factor": m.rope_low, "high_freq_factor": m.rope_high}
        yarn = {"beta_slow": m.rope_low, "beta_fast": m.rope_high}
        scaling |= llama3 if m.rope_scaling == "llama3" else yarn
        scaling["original_max_position_embeddings"] = m.rope_original_seq_len
    return {
        "rope_theta": m.rotary_base,
        "rope_scaling": None if m.rope_scaling == "none" else dict(scaling),
        "rope_parameters": {**scaling, "rope_theta": m.rotary_base},
    }


def read_window(s: Settings, window: int | None, kinds: list[str]) -> Nouns:
    """What a token looks back on in layers of these kinds, sliding_attention and full_attention."""
    sliding = [kind == SLIDING for kind in kinds]
    if odd := sorted(set(kinds) - {SLIDING, FULL}):
        s.refuse("layer_types", odd, f"there are {SLIDING} and {FULL}")
    if window is None or window >= s.need("max_position_embeddings") or not any(sliding):
        return {}
    every = sliding.index(False) + 1 if False in sliding else None
    if (every and sliding != [(i + 1) % every != 0 for i in range(len(sliding))]) or every == 1:
        s.refuse("layer_types", kinds, "layers without a window are every n-th, or none")
    return {"window": window, "global_every": every}


def kinds_of_layers(m: ModelConfig) -> list[str]:
    """layer_types: of every layer whether it has a window."""
    every = m.global_every or m.n_layers + 1
    return [FULL if not m.window or (i + 1) % every == 0 else SLIDING for i in range(m.n_layers)]
