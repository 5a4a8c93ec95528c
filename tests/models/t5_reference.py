"""Tiny T5s of transformers with random weights, and the same weights in ours."""

import jax
import numpy as np
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.layout import is_weight, path_name
from mlm_jax.models import build

MODEL = {
    "family": "t5", "positions": "relative", "n_layers": 2, "n_decoder_layers": 3, "d_model": 32,
    "n_heads": 4, "head_dim": 16, "d_mlp": 48, "vocab_size": 100, "seq_len": 48, "target_len": 80,
    "norm": "rmsnorm", "norm_eps": 1e-6, "bias": False, "attention_scale": 1.0,
    "relative_buckets": 8, "relative_distance": 20,
}  # fmt: skip
KINDS = {
    "v1.0": {"activation": "relu", "tied": True, "logit_scale": 32**-0.5},
    "v1.1": {"activation": "geglu", "tied": False},
}
SELF = {"q": "q", "k": "k", "v": "v", "o": "o"}
MLP = {
    "v1.0": {"up": "wi", "down": "wo"},
    "v1.1": {"gate": "wi_0", "up": "wi_1", "down": "wo"},
}


def transformers_t5(kind: str, seed: int = 0):
    """In evaluation mode, its weights wide enough that every part of it matters."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    m = MODEL
    config = T5Config(
        vocab_size=m["vocab_size"], d_model=m["d_model"], d_kv=m["head_dim"], d_ff=m["d_mlp"],
        num_layers=m["n_layers"], num_decoder_layers=m["n_decoder_layers"], num_heads=m["n_heads"],
        relative_attention_num_buckets=8, relative_attention_max_distance=20, dropout_rate=0.0,
        feed_forward_proj="relu" if kind == "v1.0" else "gated-gelu",
        tie_word_embeddings=kind == "v1.0", decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    if kind == "v1.1":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(m["vocab_size"], m["d_model"]))
    with torch.no_grad():
        for name, w in model.named_parameters():
            if "relative" in name or "layer_norm" in name:
                w.add_(torch.randn(w.shape) * 0.5)
            elif name.endswith(("EncDecAttention.v.weight", "EncDecAttention.o.weight")):
                w.mul_(2)  # so that what was read decides what is written
    return model


def ours_by_path(kind: str, theirs) -> dict[str, np.ndarray]:
    """Their tensors (a state dict, or gradients by name) by our paths, [in, out] and stacked."""
    part = {name: x.detach().numpy() for name, x in theirs.items()}
    ours = {"embedding.tokens": part["shared.weight"]}
    if kind == "v1.1":
        ours["head.weight"] = part["lm_head.weight"]
    for stack, n, last in (("encoder", 2, 1), ("decoder", 3, 2)):

        def stacked(name, n=n, stack=stack):
            return np.stack([part[f"{stack}.block.{i}.layer.{name}.weight"] for i in range(n)])

        def matrices(ours_name, theirs_name, names, stack=stack, stacked=stacked):
            for a, b in names.items():
                ours[f"{stack}.blocks.{ours_name}.{a}"] = stacked(f"{theirs_name}.{b}").swapaxes(
                    1, 2
                )

        matrices("attention", "0.SelfAttention", SELF)
        ours[f"{stack}.blocks.attention_norm.scale"] = stacked("0.layer_norm")
        if stack == "decoder":
            matrices("cross", "1.EncDecAttention", SELF)
            ours["decoder.blocks.cross_norm.scale"] = stacked("1.layer_norm")
        matrices("mlp", f"{last}.DenseReluDense", MLP[kind])
        ours[f"{stack}.blocks.mlp_norm.scale"] = stacked(f"{last}.layer_norm")
        ours[f"{stack}.norm.scale"] = part[f"{stack}.final_layer_norm.weight"]
        ours[f"{stack}.distances"] = part[
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ]
    return ours


def ours_like(kind: str, theirs, layout):
    """Our model with the weights of theirs; rows of padding are zeros."""
    model = build(ModelConfig(**MODEL | KINDS[kind]), layout)
    values = ours_by_path(kind, theirs.state_dict())

    def filled(path, w):
        value = values.pop(path_name(path))
        padding = [(0, n - m) for n, m in zip(w.shape, value.shape, strict=True)]
        assert all(p == (0, 0) for p in padding) or path_name(path) in PADDED
        return w.replace(jax.device_put(np.pad(value, padding), w[...].sharding))

    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree_util.tree_map_with_path(filled, params, is_leaf=is_weight))
    assert not values
    return model


PADDED = ("embedding.tokens", "head.weight")


def padded_batch(B: int = 3, S: int = 24, T: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    """Texts of different lengths, padded; what a decoder reads and writes of other lengths."""
    rng = np.random.default_rng(seed)
    lengths, written = rng.integers(S // 3, S + 1, B), rng.integers(T // 3, T + 1, B)
    mask, weights = np.arange(S) < lengths[:, None], np.arange(T) < written[:, None]
    targets = rng.integers(2, 100, (B, T), dtype=np.int32) * weights
    return {
        "tokens": rng.integers(2, 100, (B, S), dtype=np.int32) * mask,
        "segments": mask.astype(np.int32),
        "decoder_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1].astype(np.int32),
        "targets": targets.astype(np.int32), "weights": weights.astype(np.float32),
    }  # fmt: skip
