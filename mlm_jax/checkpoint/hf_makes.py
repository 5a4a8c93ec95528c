"""Makes of model as Hugging Face has them: config.json to nouns and back, by model_type."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mlm_jax.checkpoint.hf_settings import (
    ACTIVATIONS,
    FULL,
    GATED,
    SLIDING,
    Nouns,
    Settings,
    kinds_of_layers,
    read_rotary,
    read_sizes,
    read_window,
    theirs,
    write_rotary,
    write_sizes,
)
from mlm_jax.checkpoint.names import BERT, GEMMA2, GPT2, GPT_NEOX, LLAMA, T5, Table
from mlm_jax.config import ModelConfig

RMS = {"norm": "rmsnorm", "norm_bias": False, "bias": False}


class Make(NamedTuple):
    """model_type, whose classes end in these names; the first is written.

    prefix: of the tensors that a model saved without its head lacks. ignored: a regex of tensors
    that say nothing: masks, frequencies. copies: tensors that repeat another one.
    """

    classes: tuple[str, ...]
    table: Table
    prefix: str
    ignored: str
    read: Callable[[Settings], Nouns]
    write: Callable[[ModelConfig], dict[str, Any]]
    copies: Mapping[str, str] = MappingProxyType({})


def read_gpt2(s: Settings) -> Nouns:
    s.only("scale_attn_by_inverse_layer_idx", False)
    s.only("add_cross_attention", False)
    d_model = s.need("n_embd", "hidden_size")
    return {
        "vocab_size": s.need("vocab_size"), "d_model": d_model,
        "n_layers": s.need("n_layer", "num_hidden_layers"),
        "n_heads": s.need("n_head", "num_attention_heads"), "d_mlp": s.get("n_inner", None),
        "seq_len": s.need("n_positions", "n_ctx"), "norm_eps": s.get("layer_norm_epsilon", 1e-5),
        "activation": s.activation("activation_function", "gelu_new", ACTIVATIONS),
        "attention_scale": None if s.get("scale_attn_weights", True) else 1.0,
        "tied": s.tied(True),
    }  # fmt: skip


def write_gpt2(m: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": m.vocab_size, "n_embd": m.d_model, "n_layer": m.n_layers,
        "n_head": m.n_heads, "n_inner": m.d_mlp, "n_positions": m.seq_len, "n_ctx": m.seq_len,
        "layer_norm_epsilon": m.norm_eps, "activation_function": theirs(m.activation, ACTIVATIONS),
        "scale_attn_weights": m.attention_scale != 1, "tie_word_embeddings": m.tied,
        "resid_pdrop": m.dropout, "embd_pdrop": m.dropout, "attn_pdrop": 0.0,
    }  # fmt: skip


def read_llama(
    s: Settings, *, activation: str = "hidden_act", usual: str = "silu", tied: bool = False,
    **sizes: int,
) -> Nouns:  # fmt: skip
    """What Llama and its relatives share. sizes: what the make has where they are left out."""
    return {
        **RMS, **read_sizes(s, **sizes), "norm_eps": s.get("rms_norm_eps", 1e-6),
        "activation": s.activation(activation, usual, GATED),
        "tied": s.tied(tied),
    }  # fmt: skip


def write_llama(m: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(m), **write_rotary(m), "rms_norm_eps": m.norm_eps,
        "hidden_act": theirs(m.activation, GATED), "tie_word_embeddings": m.tied,
    }  # fmt: skip


def attention_biases(s: Settings) -> Nouns:
    biases = s.get("attention_bias", False)
    return {"qkv_bias": biases, "o_bias": biases}


def read_plain_llama(s: Settings) -> Nouns:
    biases = attention_biases(s) | {"mlp_bias": s.get("mlp_bias", False)}
    return read_llama(s) | read_rotary(s) | biases


def write_plain_llama(m: ModelConfig) -> dict[str, Any]:
    return write_llama(m) | {"attention_bias": m.qkv_bias, "mlp_bias": m.mlp_bias}


def read_mistral(s: Settings) -> Nouns:
    kinds = s.given("layer_types", [SLIDING] * s.need("num_hidden_layers"))
    window = read_window(s, s.get("sliding_window", 4096), kinds)
    return read_llama(s, n_kv_heads=8) | read_rotary(s) | window


def write_mistral(m: ModelConfig) -> dict[str, Any]:
    return write_llama(m) | {"sliding_window": m.window}


def read_qwen2(s: Settings) -> Nouns:
    return read_llama(s, n_kv_heads=32) | read_rotary(s) | qwen_window(s) | {"qkv_bias": True}


def read_qwen3(s: Settings) -> Nouns:
    nouns = read_llama(s, n_kv_heads=32, head_dim=128) | read_rotary(s) | qwen_window(s)
    return nouns | attention_biases(s) | {"qk_norm": True}


def qwen_window(s: Settings) -> Nouns:
    n, whole = s.need("num_hidden_layers"), s.get("max_window_layers", 28)
    kinds = s.given("layer_types", [SLIDING if i >= whole else FULL for i in range(n)])
    window = s.get("sliding_window", 4096) if s.get("use_sliding_window", False) else None
    return read_window(s, window, kinds)


def write_qwen2(m: ModelConfig) -> dict[str, Any]:
    return write_llama(m) | {
        "use_sliding_window": m.window is not None, "sliding_window": m.window,
        "max_window_layers": 0 if m.window else m.n_layers, "layer_types": kinds_of_layers(m),
    }  # fmt: skip


def write_qwen3(m: ModelConfig) -> dict[str, Any]:
    return write_qwen2(m) | {"attention_bias": m.qkv_bias}


def read_gemma(s: Settings) -> Nouns:
    exact = {"hidden_act": "gelu_pytorch_tanh"} if s.get("hidden_act", "") == "gelu" else {}
    s.values = {**s.values, **exact}  # as the first releases say, and do not mean
    key = "hidden_act" if s.values.get("hidden_activation") is None else "hidden_activation"
    return gemma(s, key, 16) | read_rotary(s)


def gemma(s: Settings, activation: str, n_kv_heads: int) -> Nouns:
    s.only("use_bidirectional_attention", None, False)
    sizes = {"n_kv_heads": n_kv_heads, "head_dim": 256}
    nouns = read_llama(s, activation=activation, usual="gelu_pytorch_tanh", tied=True, **sizes)
    scale = math.sqrt(nouns["d_model"])
    own = {"norm_zero_centered": True, "embedding_scale": scale}
    return nouns | own | attention_biases(s)


def write_gemma(m: ModelConfig) -> dict[str, Any]:
    act = theirs(m.activation, GATED)
    own = {"hidden_activation": act, "attention_bias": m.qkv_bias}
    return write_llama(m) | own


def read_gemma2(s: Settings) -> Nouns:
    n = s.need("num_hidden_layers")
    kinds = s.given("layer_types", [FULL if i % 2 else SLIDING for i in range(n)])
    nouns = gemma_both(s, 30.0, 50.0) | read_rotary(s)
    return nouns | read_window(s, s.get("sliding_window", 4096), kinds)


def gemma_both(s: Settings, logits: float | None, scores: float | None) -> Nouns:
    """What Gemma 2 and 3 share: norms on both sides, soft caps, a scale of scores of their own."""
    return gemma(s, "hidden_activation", 4) | {
        "norm_placement": "both",
        "logit_softcap": s.get("final_logit_softcapping", logits) or 0.0,
        "attention_softcap": s.get("attn_logit_softcapping", scores) or 0.0,
        "attention_scale": 1 / math.sqrt(s.given("query_pre_attn_scalar", 256)),
    }


def write_gemma2(m: ModelConfig) -> dict[str, Any]:
    scalar = m.head_dim if m.attention_scale is None else m.attention_scale**-2
    near = round(scalar)  # where the root was of a whole number, as it is
    return write_gemma(m) | {
        "query_pre_attn_scalar": near if math.isclose(near, scalar) else scalar,
        "final_logit_softcapping": m.logit_softcap or None,
        "attn_logit_softcapping": m.attention_softcap or None,
        "sliding_window": m.window or m.seq_len, "layer_types": kinds_of_layers(m),
    }  # fmt: skip


def read_gemma3(s: Settings) -> Nouns:
    n, every = s.need("num_hidden_layers"), s.given("sliding_window_pattern", None)
    every = every or s.given("_sliding_window_pattern", 6)
    kinds = [FULL if (i + 1) % every == 0 else SLIDING for i in range(n)]
    window = read_window(s, s.get("sliding_window", 4096), s.given("layer_types", kinds))
    nouns = gemma_both(s, None, None) | read_rotary(s, 1e6, nested=FULL) | window
    local = read_rotary(
        Settings({"rope_parameters": s.get("rope_parameters", None)}),
        s.given("rope_local_base_freq", 10000.0), nested=SLIDING,
    )  # fmt: skip
    if "rope_scaling" in local:
        s.refuse("rope_parameters", s.get("rope_parameters", None), "layers with a window have"
                 " rope_type 'default'")  # fmt: skip
    same = local["rotary_base"] == nouns["rotary_base"] and "rope_scaling" not in nouns
    if not window and not same and SLIDING in s.given("layer_types", kinds):
        s.refuse("sliding_window", s.get("sliding_window", 4096), "it is no window, and the layers"
                 " that have it differ in their rotary base")  # fmt: skip
    base = None if same or not window else local["rotary_base"]
    # transformers knows a soft cap of Gemma 3's scores, and does not apply it.
    return nouns | {"qk_norm": True, "rotary_local_base": base, "attention_softcap": 0.0}


def write_gemma3(m: ModelConfig) -> dict[str, Any]:
    config, local = write_gemma2(m), m.rotary_local_base or m.rotary_base
    full, sliding = config["rope_parameters"], {"rope_type": "default", "rope_theta": local}
    nested = {"rope_parameters": {FULL: full, SLIDING: sliding}, "rope_local_base_freq": local}
    return config | nested


def read_gpt_neox(s: Settings) -> Nouns:
    rotary = read_rotary(s, 10000.0, 0.25, base_key="rotary_emb_base", share_key="rotary_pct")
    biases, parallel = s.get("attention_bias", True), s.get("use_parallel_residual", True)
    return read_sizes(s) | rotary | {
        "n_kv_heads": None, "head_dim": None, "norm_eps": s.get("layer_norm_eps", 1e-5),
        "activation": s.activation("hidden_act", "gelu", ACTIVATIONS),
        "parallel": parallel, "parallel_norms": 2 if parallel else 1,
        "qkv_bias": biases, "o_bias": biases, "tied": s.tied(False, "embed_out.weight"),
    }  # fmt: skip


def write_gpt_neox(m: ModelConfig) -> dict[str, Any]:
    config = write_sizes(m) | write_rotary(m)
    del config["num_key_value_heads"], config["head_dim"]
    config["rope_parameters"]["partial_rotary_factor"] = m.rotary_share
    return config | {
        "rotary_pct": m.rotary_share, "rotary_emb_base": m.rotary_base,
        "layer_norm_eps": m.norm_eps, "hidden_act": theirs(m.activation, ACTIVATIONS),
        "use_parallel_residual": m.parallel, "attention_bias": m.qkv_bias,
        "tie_word_embeddings": m.tied, "hidden_dropout": m.dropout, "attention_dropout": 0.0,
    }  # fmt: skip


def read_bert(s: Settings) -> Nouns:
    s.only("position_embedding_type", "absolute")
    s.only("is_decoder", False)
    s.only("add_cross_attention", False)
    s.only("tie_word_embeddings", True)
    has = lambda name: name in s.tensors  # noqa: E731
    return read_sizes(s) | {
        "family": "bert", "n_kv_heads": None, "head_dim": None, "norm_placement": "post",
        "norm_eps": s.get("layer_norm_eps", 1e-12), "embedding_norm": True,
        "activation": s.activation("hidden_act", "gelu", ACTIVATIONS),
        "token_types": s.get("type_vocab_size", 2),
        "mlm_head": has("cls.predictions.transform.dense.weight"),
        "pooler": has("bert.pooler.dense.weight"),
        "order_head": has("cls.seq_relationship.weight")
        and has("cls.predictions.transform.dense.weight"),  # no class has the one without the other
    }  # fmt: skip


def write_bert(m: ModelConfig) -> dict[str, Any]:
    config = write_sizes(m)
    del config["num_key_value_heads"], config["head_dim"]
    kind = "ForPreTraining" if m.order_head else "ForMaskedLM" if m.mlm_head else "Model"
    return config | {
        "architectures": [f"Bert{kind}"], "layer_norm_eps": m.norm_eps,
        "hidden_act": theirs(m.activation, ACTIVATIONS), "type_vocab_size": m.token_types or 1,
        "tie_word_embeddings": True, "position_embedding_type": "absolute",
        "hidden_dropout_prob": m.dropout, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


T5_FEED_FORWARD = {
    "relu": ("relu",), "geglu": ("gated-gelu",), "swiglu": ("gated-silu",), "gelu_exact": ("gelu",),
    "gelu": ("gelu_new",),
}  # fmt: skip


def read_t5(s: Settings, *, scaled: bool = True) -> Nouns:
    """scaled: whether transformers 5 multiplies what a tied head reads by d_model ** -0.5."""
    tied = s.tied(True)
    scale = s.get("scale_decoder_outputs", s.says_tied(True) if scaled else False)
    if not scaled and str(s.get("transformers_version", "5")) < "5":
        scale = tied
    d_model = s.need("d_model")
    return {
        **RMS, "family": "t5", "vocab_size": s.need("vocab_size"), "d_model": d_model,
        "head_dim": s.need("d_kv"), "d_mlp": s.need("d_ff"), "n_layers": s.need("num_layers"),
        "n_decoder_layers": s.get("num_decoder_layers", None), "n_heads": s.need("num_heads"),
        "seq_len": s.given("n_positions", 512), "norm_eps": s.get("layer_norm_epsilon", 1e-6),
        "activation": s.activation("feed_forward_proj", "relu", T5_FEED_FORWARD),
        "positions": "relative", "attention_scale": 1.0, "tied": tied,
        "relative_buckets": s.get("relative_attention_num_buckets", 32),
        "relative_distance": s.get("relative_attention_max_distance", 128),
        "logit_scale": 1 / math.sqrt(d_model) if scale else 1.0,
    }  # fmt: skip


def write_t5(m: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": m.vocab_size, "d_model": m.d_model, "d_kv": m.head_dim, "d_ff": m.d_mlp,
        "num_layers": m.n_layers, "num_decoder_layers": m.n_decoder_layers, "num_heads": m.n_heads,
        "n_positions": m.seq_len, "layer_norm_epsilon": m.norm_eps, "is_encoder_decoder": True,
        "feed_forward_proj": theirs(m.activation, T5_FEED_FORWARD),
        "relative_attention_num_buckets": m.relative_buckets,
        "relative_attention_max_distance": m.relative_distance, "tie_word_embeddings": m.tied,
        "scale_decoder_outputs": m.logit_scale != 1, "dropout_rate": m.dropout,
        "decoder_start_token_id": 0,
    }  # fmt: skip


def read_mt5(s: Settings) -> Nouns:
    return read_t5(s, scaled=False)


FREQUENCIES = r".*rotary_emb\.inv_freq"
MASKS = r".*\.attn\.(masked_)?bias"
NEOX = rf".*\.attention\.(masked_)?bias|{FREQUENCIES}"
PLACES = r".*\.position_ids"
UNUSED = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
BERT_COPIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
T5_COPIES = {f"{side}coder.embed_tokens.weight": "shared.weight" for side in ("en", "de")}


def llamas(name: str, read: Any, write: Any, table: Table = LLAMA, base: str | None = None) -> Make:
    classes = f"{name}ForCausalLM", f"{base or name}Model"
    return Make(classes, table, "model.", FREQUENCIES, read, write)


def t5s(name: str, read: Any) -> Make:
    return Make((f"{name}ForConditionalGeneration",), T5, "", UNUSED, read, write_t5, T5_COPIES)


MAKES = {  # the first that says all that a model is, is what an export makes
    "gpt2": Make(
        ("GPT2LMHeadModel", "GPT2Model"), GPT2, "transformer.", MASKS, read_gpt2, write_gpt2
    ),
    "llama": llamas("Llama", read_plain_llama, write_plain_llama),
    "mistral": llamas("Mistral", read_mistral, write_mistral),
    "qwen2": llamas("Qwen2", read_qwen2, write_qwen2),
    "qwen3": llamas("Qwen3", read_qwen3, write_qwen3),
    "gemma": llamas("Gemma", read_gemma, write_gemma),
    "gemma2": llamas("Gemma2", read_gemma2, write_gemma2, GEMMA2),
    "gemma3_text": llamas("Gemma3", read_gemma3, write_gemma3, GEMMA2, "Gemma3Text"),
    "gpt_neox": Make(
        ("GPTNeoXForCausalLM", "GPTNeoXModel"), GPT_NEOX, "gpt_neox.", NEOX, read_gpt_neox,
        write_gpt_neox,
    ),
    "bert": Make(
        ("BertForPreTraining", "BertForMaskedLM", "BertModel"), BERT, "bert.", PLACES, read_bert,
        write_bert, BERT_COPIES,
    ),
    "t5": t5s("T5", read_t5),
    "mt5": t5s("MT5", read_mt5),
}  # fmt: skip
