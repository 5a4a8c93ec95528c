"""Tiny models of transformers, with random weights, one for each make and way to lie."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 64, "initializer_range": 0.1,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GQA = SIZES | {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> class of the config, its settings
    "gpt2": ("GPT2Config", {
        "vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1,
    }),
    "llama": ("LlamaConfig", GQA),
    "llama_biases_tied": ("LlamaConfig", GQA | {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 32,
        "rope_parameters": LLAMA3,
    }),
    "llama_yarn": ("LlamaConfig", GQA | {"rope_parameters": YARN | {"rope_theta": 1e4}}),
    "mistral": ("MistralConfig", GQA | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", GQA | {
        "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0,
    }),
    "qwen3": ("Qwen3Config", GQA | {"head_dim": 32}),
    "gemma": ("GemmaConfig", SIZES | {"num_key_value_heads": 1, "head_dim": 32}),
    "gemma2": ("Gemma2Config", GQA | {
        "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 8,
    }),
    "gemma3": ("Gemma3TextConfig", GQA | {
        "num_hidden_layers": 6, "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 8,
    }),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "gpt_neox_sequential": ("GPTNeoXConfig", SIZES | {
        "use_parallel_residual": False, "tie_word_embeddings": True,
    }),
}  # fmt: skip
DECODERS = tuple(CONFIGS)  # which write what follows
T5 = {
    "vocab_size": 300, "d_model": 48, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
CONFIGS |= {
    "bert_alone": ("BertConfig", SIZES),
    "bert_words": ("BertConfig", SIZES),
    "bert": ("BertConfig", SIZES),
    "t5": ("T5Config", T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": True}),
    "t5_v1_1": ("T5Config", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5Config", T5 | {"num_decoder_layers": 3}),
}
CLASSES = {
    "bert_alone": "BertModel", "bert_words": "BertForMaskedLM", "bert": "BertForPreTraining",
    "t5": "T5ForConditionalGeneration", "t5_v1_1": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
}  # fmt: skip
IDS = np.random.default_rng(0).integers(2, 300, (2, 24))
MASK = np.arange(24) < np.array([[24], [17]])  # of what reads both ways: the second row is shorter


def make(name: str, folder: Path, **changes: Any) -> Any:
    """The reference model, saved to folder. Norms and biases start apart from 1 and 0."""
    torch.manual_seed(0)
    kind, settings = CONFIGS[name]
    config = getattr(transformers, kind)(**settings | changes)
    of = class_of(name)
    model = (of(config) if name in CLASSES else of.from_config(config)).eval()
    for weight in model.parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, float(weight.detach().mean()), 0.2)
        elif "T5" in kind:  # whose own are so small that no mistake would be seen
            torch.nn.init.normal_(weight, 0.0, 0.2)
    model.save_pretrained(folder)
    return model


def class_of(name: str) -> Any:
    if name in CLASSES:
        return getattr(transformers, CLASSES[name])
    return transformers.AutoModelForCausalLM


def logits_of(model: Any) -> list[np.ndarray]:
    """What the reference says of IDS: logits, or states, and of a BERT all that it has."""
    kind, ids, mask = type(model).__name__, torch.tensor(IDS), torch.tensor(MASK).long()
    with torch.no_grad():
        if "T5" in kind:
            out = model(ids, attention_mask=mask, decoder_input_ids=ids[:, :9], use_cache=False)
            found = [out.logits]
        elif "Bert" in kind:
            out = model(ids, attention_mask=mask, token_type_ids=ids % 2)
            found = [x[mask > 0] if x.ndim == 3 else x for x in out.to_tuple()]
        else:
            found = [model(ids).logits]
    return [x.float().numpy() for x in found]
