"""Update rules against their formulas in numpy, and that stacking layers changes nothing."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mlm_jax.layout import Layout, path_name
from mlm_jax.models import build
from mlm_jax.optimizer import RULES, groups, make_optimizer
from tests.conftest import named, tiny_run

MATRICES = {"q", "k", "v", "o", "gate", "up", "down", "tokens", "positions", "weight"}
BLOCK = {  # one layer. Adafactor factors what has 128 or more both ways
    "up": {"embed": 128, "mlp": 160},
    "down": {"mlp_inner": 160, "residual": 128},
    "q": {"embed": 128, "heads": 128},
    "small": {"embed": 24, "heads": 40},
    "bias": {"mlp": 160},
}
OUTSIDE = {
    "embedding": {"tokens": {"vocab_in": 256, "vocab_embed": 128}},
    "head": {"weight": {"embed": 128, "vocab": 256}},
    "norm": {"scale": {"residual": 128}},
}
LAYERS, UPDATES = 3, 3


LR, DECAY, CLIP = 0.01, 0.3, 50.0
SCALES = {"matrix": 3.0, "embedding": 0.5, "head": 2.0}
SETTINGS = {
    "adamw": {"b1": 0.8, "b2": 0.9, "eps": 1e-6},
    "lion": {"b1": 0.8, "b2": 0.9},
    "sgd": {"momentum": 0.7},
    "muon": {"b1": 0.8, "b2": 0.9, "eps": 1e-6, "momentum": 0.7},
    "adafactor": {},
}


def optimizer_of(name, **settings):
    """With everything that surrounds the rule: clipping, decay, rates of groups."""
    scales = {f"{group}_lr_scale": scale for group, scale in SCALES.items()}
    around = {"name": name, "lr": LR, "weight_decay": DECAY, "clip": CLIP} | scales
    return make_optimizer(tiny_run("llama", optimizer=around | SETTINGS[name] | settings))


def weights(seed, std=1.0):
    """Numbers for a tree of single layers; each layer's are of another size."""
    rng = np.random.default_rng(seed)
    draw = lambda dims, size: size * std * rng.standard_normal(tuple(dims.values()))  # noqa: E731
    blocks = [{k: draw(d, 10.0**i) for k, d in BLOCK.items()} for i in range(LAYERS)]
    outside = {a: {b: draw(d, 1.0) for b, d in part.items()} for a, part in OUTSIDE.items()}
    return outside | {"blocks": blocks}


def declared(tree):
    """The same tree with names, as a model's weights have them."""
    blocks = [{k: param(x, BLOCK[k]) for k, x in block.items()} for block in tree["blocks"]]
    return named_outside(tree) | {"blocks": blocks}


def stacked(tree):
    """The same weights as a model holds them: blocks stacked."""
    blocks = {
        k: param(np.stack([block[k] for block in tree["blocks"]]), ["layer", *dims])
        for k, dims in BLOCK.items()
    }
    return named_outside(tree) | {"blocks": blocks}


def named_outside(tree):
    return {a: {b: param(tree[a][b], d) for b, d in part.items()} for a, part in OUTSIDE.items()}


def param(x, dims):
    return nnx.Param(jnp.asarray(x), out_sharding=tuple(dims), eager_sharding=False)


@cache
def updated(name, form):
    """Weights, named blocks.0.up, after UPDATES updates of weights in this form."""
    tx = optimizer_of(name)

    @jax.jit
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = form(weights(0, 0.02))
    state = jax.jit(tx.init)(params)
    for k in range(UPDATES):
        params, state = update(form(weights(k + 1)), state, params)
    unstacked = {}
    for path, x in named(params).items():
        block, _, rest = path.partition(".")
        if form is stacked and block == "blocks":
            unstacked |= {f"blocks.{i}.{rest}": layer for i, layer in enumerate(x)}
        else:
            unstacked[path] = x
    return unstacked


# As seen by one layer


@pytest.mark.parametrize("name", RULES)
def test_stacked_layers_are_updated_as_single_ones_are(name):
    with jax.enable_x64(True):
        together, one_by_one = updated(name, stacked), updated(name, declared)
        begin = named(declared(weights(0, 0.02)))
    assert together.keys() == one_by_one.keys() == begin.keys()
    for path, x in one_by_one.items():
        assert np.abs(x - begin[path]).mean() > 1e-8, path
        np.testing.assert_allclose(together[path], x, rtol=1e-9, atol=1e-12, err_msg=path)


def test_experts_count_as_copies_and_a_router_does_not():
    params = {"blocks": {
        "up": param(np.ones((2, 4, 8, 6)), ("layer", "expert", "embed", "mlp")),
        "up_bias": param(np.ones((2, 4, 6)), ("layer", "expert", "mlp")),
        "router": param(np.ones((2, 8, 4)), ("layer", "embed", "expert")),
    }}  # fmt: skip
    assert groups(params)["blocks"] == {"up": "matrix", "up_bias": "rest", "router": "matrix"}


# The formulas


def adamw(w, g, t, memory):
    m = memory["m"] = 0.8 * memory.get("m", 0) + 0.2 * g
    v = memory["v"] = 0.9 * memory.get("v", 0) + 0.1 * g**2
    return m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6)


def lion(w, g, t, memory):
    m = memory.get("m", 0)
    memory["m"] = 0.9 * m + 0.1 * g
    return np.sign(0.8 * m + 0.2 * g)


def sgd(w, g, t, memory):
    memory["m"] = 0.7 * memory.get("m", 0) + g
    return memory["m"]


def muon(w, g, t, memory):
    m = memory["m"] = 0.7 * memory.get("m", 0) + 0.3 * g
    x = 0.7 * m / (1 - 0.7 ** (t + 1)) + 0.3 * g / (1 - 0.7**t)  # Nesterov
    x = x / (np.linalg.norm(x) + 1e-6)
    for _ in range(5):  # Newton-Schulz; the short side first or not, the result is the same
        xx = x @ x.T
        x = 3.4445 * x + (-4.7750 * xx + 2.0315 * xx @ xx) @ x
    return x * math.sqrt(max(1, x.shape[1] / x.shape[0]))


def adafactor(w, g, t, memory):
    keep, rms = 1 - t**-0.8, lambda x: np.sqrt(np.mean(x**2))
    if w.ndim == 2 and min(w.shape) >= 128:
        row = memory["r"] = keep * memory.get("r", 0) + (1 - keep) * (g**2).mean(1, keepdims=True)
        col = memory["c"] = keep * memory.get("c", 0) + (1 - keep) * (g**2).mean(0, keepdims=True)
        v = row * col / row.mean()
    else:
        v = memory["v"] = keep * memory.get("v", 0) + (1 - keep) * g**2
    u = g / np.sqrt(v)
    return u / max(1, rms(u)) * max(rms(w), 1e-3)


FORMULAS = {"adamw": adamw, "lion": lion, "sgd": sgd, "muon": muon, "adafactor": adafactor}


@pytest.mark.parametrize("name", RULES)
def test_every_optimizer_is_its_formula(name):
    """Clip by the global norm; then the rule; then decay of matrices; then the group's rate."""
    with jax.enable_x64(True):
        got = updated(name, stacked)
        expected = named(declared(weights(0, 0.02)))
        gradients = [named(declared(weights(k + 1))) for k in range(UPDATES)]
    norms = [math.sqrt(sum((g**2).sum() for g in grads.values())) for grads in gradients]
    assert min(norms) > 10 * CLIP
    for path, w in expected.items():
        is_matrix = path.startswith("blocks") and w.ndim == 2
        rule = adamw if name == "muon" and not is_matrix else FORMULAS[name]
        scale = SCALES.get("matrix" if is_matrix else path.partition(".")[0], 1.0)
        memory = {}
        for t, (grads, norm) in enumerate(zip(gradients, norms, strict=True), 1):
            u = rule(w, grads[path] * CLIP / norm, t, memory)
            w = w - LR * scale * (u + DECAY * w * (w.ndim == 2))
        np.testing.assert_allclose(got[path], w, rtol=1e-6, atol=1e-9, err_msg=path)


# Before and after the rule


def update(run, gradient):
    """The first update, where every gradient is this number; and the state of the rule after it."""
    params = first_weights(run.model)
    tx = make_optimizer(run)

    @jax.jit
    def first(params):
        grads = jax.tree.map(lambda w: jnp.full_like(w, gradient), params)
        return tx.update(grads, tx.init(params), params)

    updates, state = first(params)
    return named(params), named(updates), state[1]


@cache
def first_weights(cfg):
    return nnx.state(build(cfg, Layout.create(jax.devices()[:1])), nnx.Param)


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_matrices_and_embeddings_decay_and_nothing_else(style):
    run = tiny_run(style, optimizer={"weight_decay": 0.5, "lr": 0.1})
    params, moved, _ = update(run, gradient=0.0)
    for path, change in moved.items():
        decays = path.rpartition(".")[2] in MATRICES
        np.testing.assert_allclose(change, -0.1 * 0.5 * params[path] * decays, rtol=1e-6)


def test_weight_decay_follows_its_schedule():
    run = tiny_run(
        train={"steps": 4},
        optimizer={
            "name": "sgd", "lr": 0.1, "weight_decay": 0.0, "weight_decay_end": 0.4,
            "weight_decay_schedule": "linear",
        },
    )  # fmt: skip
    tx, params = make_optimizer(run), stacked(weights(0))
    state, nothing = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(tx.update)
    for decay in (0.0, 0.1, 0.2, 0.3, 0.4, 0.4):
        updates, state = update(nothing, state, params)
        moved, w = (tree["blocks"]["up"][...] for tree in (updates, params))
        np.testing.assert_allclose(moved, -0.1 * decay * w, rtol=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_gradients_are_clipped_to_the_global_norm(clip):
    run = tiny_run(optimizer={"clip": clip, "b1": 0.9})
    mu = named(update(run, gradient=2.0)[-1].mu)
    count = sum(value.size for value in mu.values())
    seen = math.sqrt(sum(np.square(value, dtype=float).sum() for value in mu.values())) / 0.1
    assert seen == pytest.approx(clip or 2.0 * math.sqrt(count), rel=1e-5)


def test_a_model_has_all_groups():
    params = first_weights(tiny_run("llama").model)
    by_group = {}
    for path, group in jax.tree_util.tree_leaves_with_path(groups(params)):
        by_group.setdefault(group, set()).add(path_name(path))
    assert by_group == {
        "embedding": {"embedding.tokens"},
        "head": {"head.weight"},
        "matrix": {f"blocks.attention.{w}" for w in "qkvo"}
        | {f"blocks.mlp.{w}" for w in ("gate", "up", "down")},
        "rest": {"blocks.attention_norm.scale", "blocks.mlp_norm.scale", "norm.scale"},
    }


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"adafactor"}))
def test_only_first_moments_are_stored_as_told(name):
    wide, narrow = (
        jax.eval_shape(optimizer_of(name, moment_dtype=dtype).init, stacked(weights(0)))
        for dtype in ("float32", "bfloat16")
    )
    found = set()
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(wide), jax.tree.leaves(narrow), strict=True
    ):
        first = {getattr(key, "name", "") for key in path} & {"mu", "trace"}
        assert after.dtype == ("bfloat16" if first else before.dtype), path
        found |= first
    assert len(found) == 1
