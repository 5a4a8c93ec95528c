"""Eight virtual devices, and the tiny runs that tests share.

XLA reads its flags when jax starts, so they are set here, before any test module is imported;
whatever the environment already says stays.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlm_jax.config import RunConfig
from mlm_jax.door import from_dict

FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    "--xla_cpu_collective_call_terminate_timeout_seconds": 300,  # eight threads share few cores
    "--xla_backend_optimization_level": 0,  # the same partitioned program in half the time
}
given = os.environ.get("XLA_FLAGS", "")
added = [f"{flag}={value}" for flag, value in FLAGS.items() if flag not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read back from the cache, XLA:CPU's programs no longer order their collectives, and deadlock: jax
# 0.10 and 0.12, within some 50 steps on eight devices.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

STYLES: dict[str, dict[str, Any]] = {
    "gpt2": {},  # layernorm, learned positions, gelu, biases, tied: the defaults
    "llama": {
        "norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "n_kv_heads": 2,
        "bias": False, "tied": False,
    },
    "nouns": {  # all that the two others lack; the second layer sees all, and rotates nothing
        "norm": "rmsnorm", "positions": "rotary", "rope_scaling": "llama3", "rope_factor": 4.0,
        "rope_original_seq_len": 16, "nope_every": 2, "window": 8, "global_every": 2,
        "rotary_local_base": 100.0, "rotary_share": 0.5, "activation": "geglu", "qk_norm": True,
        "norm_placement": "both", "norm_zero_centered": True, "qkv_bias": False,
        "attention_softcap": 5.0,
        "logit_softcap": 10.0, "embedding_scale": 2.0, "residual_scale": 0.5,
        "attention_scale": 0.3, "logit_scale": 0.7,
    },
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {"dp": 8},
    "fsdp": {"fsdp": 8},
    "tp": {"dp": 2, "tp": 4},
    "tp_sp": {"dp": 2, "tp": 4, "sequence_parallel": True},
    "fsdp_tp": {"fsdp": 2, "tp": 4},
    "dp_fsdp_tp": {"dp": 2, "fsdp": 2, "tp": 2},
}


def tiny_run(style: str = "gpt2", **sections: Mapping[str, Any]) -> RunConfig:
    """tiny_run("llama", train={"accumulate": 4}): two layers, and a vocabulary that needs padding.

    Weights start at 0.1: at a width of 64, 0.02 leaves attention so even that no mask would matter.
    """
    tiny = {
        "model": {
            "n_layers": 2, "d_model": 64, "n_heads": 4, "seq_len": 32, "vocab_size": 500,
            "init_std": 0.1, **STYLES[style],
        },
        "train": {"global_batch_size": 32, "steps": 5},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
    }  # fmt: skip
    names = tiny.keys() | sections.keys()
    return from_dict({name: {**tiny.get(name, {}), **sections.get(name, {})} for name in names})


def tiny_layout(run: RunConfig, **sizes: Any):
    """A layout over as many devices as its sizes need: one without sizes."""
    import jax

    from mlm_jax.layout import MESH_AXES, Layout

    count = int(np.prod([sizes.get(axis, 1) for axis in MESH_AXES]))
    layout = Layout.create(jax.devices()[:count], **sizes)
    return layout.fit(run.model, batch=run.train.global_batch_size // run.train.accumulate)


def tiny_batch(
    run: RunConfig, seed: int = 0, packed: bool = False, least: float = 0.0
) -> dict[str, np.ndarray]:
    """Random tokens whose rows are trained on to very different shares, from `least` of a row on.

    So a mean over microbatches or devices is not the mean over tokens.
    """
    rng = np.random.default_rng(seed)
    B, T = run.train.global_batch_size, run.model.seq_len
    ids = rng.integers(0, run.model.vocab_size, (B, T + 1), dtype=np.int32)
    weights = rng.random((B, T)) < least + (1 - least) * rng.random((B, 1)) ** 2
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights.astype(np.float32)}
    if packed:
        starts = rng.random((B, T)) < 0.1
        starts[:, 0] = True
        at = np.arange(T, dtype=np.int32)
        batch["segments"] = starts.cumsum(1, dtype=np.int32)
        batch["positions"] = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    return batch


def place(batch: Mapping[str, np.ndarray], layout: Any) -> dict[str, Any]:
    import jax

    return {name: jax.device_put(x, layout.sharding("batch", None)) for name, x in batch.items()}


def named(tree: Any) -> dict[str, np.ndarray]:
    """Arrays by the path of their weight: blocks.mlp.up."""
    import jax

    from mlm_jax.layout import is_weight, path_name

    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weight)
    return {path_name(path): np.asarray(w[...] if is_weight(w) else w) for path, w in leaves}
