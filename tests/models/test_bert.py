"""BERT beside transformers' own on the same weights; and under layouts beside one device."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from mlm_jax.errors import ConfigError
from mlm_jax.inference.engine import generate
from mlm_jax.losses import next_token_nats
from mlm_jax.models import build
from mlm_jax.step import make_steps
from tests.conftest import named, place, tiny_layout, tiny_run

STYLES = {
    "post": {  # as published
        "norm_placement": "post", "embedding_norm": True, "activation": "gelu_exact",
        "norm_eps": 1e-12,
    },
    "pre": {},  # Megatron-LM's
    "encoder": {"token_types": 0, "mlm_head": False, "pooler": False, "order_head": False},
}  # fmt: skip
LAYOUTS = {
    "dp": {"dp": 8},
    "zero1": {"dp": 4, "zero": 1},
    "fsdp": {"fsdp": 4},
    "tp": {"dp": 2, "tp": 4},
    "tp_sp": {"tp": 4, "sequence_parallel": True},
    "fsdp_tp": {"fsdp": 2, "tp": 4},
    "cp": {"cp": 4},
    "dp_cp": {"dp": 2, "cp": 2},
    "cp_tp": {"cp": 2, "tp": 2},
    "pp_dp": {"pp": 2, "dp": 2},
    "pp_cp_tp": {"pp": 2, "cp": 2, "tp": 2},
    "pp_interleaved": {"pp": 2, "chunks": 2, "fsdp": 2},
}
FAST = (("cp_tp", "post"), ("pp_dp", "pre"))
STEPS = 3


def bert_run(style="post", *, model=None, accumulate=1, **sections):
    given = {"family": "bert", "token_types": 2, "n_layers": 4, **STYLES[style], **(model or {})}
    train = {"global_batch_size": 16, "accumulate": accumulate}
    # Adam divides a gradient by its own size: see test_parity on eps.
    return tiny_run(model=given, train=train, optimizer={"eps": 1e-6}, **sections)


def bert_batch(run, seed=0):
    """Random tokens, of which few are predicted, in rows of different lengths."""
    rng = np.random.default_rng(seed)
    B, T = run.train.global_batch_size, run.model.seq_len
    tokens, targets = rng.integers(0, run.model.vocab_size, (2, B, T), dtype=np.int32)
    real = np.arange(T) < rng.integers(T // 3, T + 1, (B, 1))
    batch = {
        "tokens": tokens, "targets": targets, "segments": real.astype(np.int32),
        "weights": (real & (rng.random((B, T)) < rng.random((B, 1)) ** 2)).astype(np.float32),
    }  # fmt: skip
    if run.model.token_types:
        batch["types"] = (np.arange(T) >= rng.integers(1, T, (B, 1))).astype(np.int32)
    if run.model.order_head:
        batch["swapped"] = rng.integers(0, 2, B, dtype=np.int32)
    return batch


def reads(batch):
    return {"mask": batch["segments"], "token_types": batch.get("types")}


@functools.cache
def reference():
    """(transformers' model, our run and weights): random, biases and norms too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run = bert_run()
    m = run.model
    config = transformers.BertConfig(
        vocab_size=m.vocab_size, hidden_size=m.d_model, num_hidden_layers=m.n_layers,
        num_attention_heads=m.n_heads, intermediate_size=m.d_mlp, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, max_position_embeddings=m.seq_len,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.BertForPreTraining(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, w in theirs.named_parameters():
            w.copy_(0.1 * torch.randn(w.shape, generator=generator) + name.endswith("Norm.weight"))
    return theirs, run, ours_of({name: w.detach() for name, w in theirs.named_parameters()}, m)


def ours_of(theirs, cfg):
    """Arrays of transformers' names, weights or gradients, by ours."""
    a = {name: x.numpy() for name, x in theirs.items()}
    rows = lambda x: np.pad(x, [(0, cfg.padded_vocab - len(x))] + [(0, 0)] * (x.ndim - 1))  # noqa: E731
    at = "bert.embeddings"
    found = {
        "embedding.tokens": rows(a[f"{at}.word_embeddings.weight"]),
        "embedding.positions": a[f"{at}.position_embeddings.weight"],
        "embedding.types": a[f"{at}.token_type_embeddings.weight"],
        "head.bias": rows(a["cls.predictions.bias"]),
    }
    layers = {
        "attention.q": "attention.self.query", "attention.k": "attention.self.key",
        "attention.v": "attention.self.value", "attention.o": "attention.output.dense",
        "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
    }  # fmt: skip
    norms = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
    every = [f"bert.encoder.layer.{i}" for i in range(cfg.n_layers)]
    for ours, name in layers.items():
        found[f"blocks.{ours}"] = np.stack([a[f"{at}.{name}.weight"].T for at in every])
        found[f"blocks.{ours}_bias"] = np.stack([a[f"{at}.{name}.bias"] for at in every])
    for ours, name in norms.items():
        for part, of in (("scale", "weight"), ("bias", "bias")):
            found[f"blocks.{ours}.{part}"] = np.stack([a[f"{at}.{name}.{of}"] for at in every])
    alone = {
        "transform": "cls.predictions.transform.dense", "pooler": "bert.pooler.dense",
        "order": "cls.seq_relationship",
    }  # fmt: skip
    for ours, name in alone.items():
        found[f"{ours}.dense"] = a[f"{name}.weight"].T
        found[f"{ours}.dense_bias"] = a[f"{name}.bias"]
    lone_norms = {
        "embedding.norm": f"{at}.LayerNorm",
        "transform.norm": "cls.predictions.transform.LayerNorm",
    }
    for ours, name in lone_norms.items():
        found[f"{ours}.scale"], found[f"{ours}.bias"] = a[f"{name}.weight"], a[f"{name}.bias"]
    return found


def with_weights(model, arrays):
    """The model with these arrays, laid as its own are."""
    state = nnx.state(model, nnx.Param)
    assert named(state).keys() == arrays.keys()

    def of(path, w):
        name = ".".join(str(getattr(k, "key", k)) for k in path)
        return w.replace(jax.device_put(arrays[name], w[...].sharding))

    is_weight = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    nnx.update(model, jax.tree_util.tree_map_with_path(of, state, is_leaf=is_weight))
    return model


def close(ours, theirs, rtol):
    """Relative to the largest."""
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * abs(theirs).max())


@pytest.mark.parametrize("layout", ["single", pytest.param("tp", marks=pytest.mark.slow)])
def test_equals_transformers(layout):
    theirs, run, weights = reference()
    torch = pytest.importorskip("torch")
    batch = bert_batch(run)
    model = build(run.model, tiny_layout(run, **LAYOUTS.get(layout, {})))
    model = with_weights(model, weights)
    forward = jax.jit(lambda model, tokens, **how: (
        model(tokens, **how), states := model.states(tokens, **how), pooled := model.pooled(states),
        model.order_logits(pooled),
    ))  # fmt: skip
    logits, states, pooled, order = forward(model, batch["tokens"], **reads(batch))
    tokens, mask, types = (
        torch.tensor(batch[name]).long() for name in ("tokens", "segments", "types")
    )
    with torch.no_grad():
        body = theirs.bert(tokens, attention_mask=mask, token_type_ids=types)
        heads = theirs(tokens, attention_mask=mask, token_type_ids=types)
    real = batch["segments"] == 1
    close(states[real], body.last_hidden_state.numpy()[real], 2e-5)
    close(pooled, body.pooler_output, 2e-5)
    close(logits[real], heads.prediction_logits.numpy()[real], 2e-5)
    close(order, heads.seq_relationship_logits, 2e-5)
    assert logits.shape == (16, 32, 500)
    assert logits.dtype == order.dtype == np.float32
    with torch.no_grad():
        whole = theirs(tokens).prediction_logits
    close(jax.jit(lambda model, tokens: model(tokens))(model, batch["tokens"]), whole, 2e-5)


def test_gradients_equal_torchs():
    """Of the mean over hidden words, and the mean over rows: Megatron-LM's lm_loss + sop_loss."""
    theirs, run, weights = reference()
    torch = pytest.importorskip("torch")
    batch = bert_batch(run)
    total, B = batch["weights"].sum(), len(batch["tokens"])

    def loss(model):
        more = {"order_weights": np.full(B, total / B, np.float32)}
        return next_token_nats(model, batch | more, None, chunks=2).objective / total

    model = with_weights(build(run.model, tiny_layout(run)), weights)
    found, grads = jax.jit(nnx.value_and_grad(loss))(model)
    given = {name: torch.tensor(x).long() for name, x in batch.items() if name != "weights"}
    theirs.zero_grad()
    expected = theirs(
        given["tokens"], attention_mask=given["segments"], token_type_ids=given["types"],
        labels=torch.where(torch.tensor(batch["weights"]) > 0, given["targets"], -100),
        next_sentence_label=given["swapped"],
    ).loss  # fmt: skip
    expected.backward()
    assert float(found) == pytest.approx(expected.item(), rel=1e-5)
    grads = named(nnx.state(grads, nnx.Param))
    expected = ours_of({name: w.grad for name, w in theirs.named_parameters()}, run.model)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        if name == "blocks.attention.k_bias":  # which softmax cancels: 0 but for rounding
            assert abs(grads[name]).max() < 1e-6
        else:
            close(grads[name], grad, 1e-4)


@pytest.mark.parametrize(
    "style", [pytest.param(s, marks=() if s == "post" else pytest.mark.slow) for s in STYLES]
)
def test_no_token_sees_padding_and_all_see_each_other(style):
    run = bert_run(style, model={"n_layers": 2})
    model = build(run.model, tiny_layout(run))
    forward = jax.jit(lambda model, tokens, how: model(tokens, **how))
    batch = bert_batch(run)
    tokens, real = batch["tokens"], batch["segments"] == 1
    before = np.array(forward(model, tokens, reads(batch)))
    changed = np.where(real, tokens, (tokens + 1) % 500)
    after = np.array(forward(model, changed, reads(batch)))
    assert (before[real] == after[real]).all()
    assert (before != after).any()
    seen = np.array(forward(model, changed, reads(batch) | {"mask": None}))
    assert (abs(seen - before).max(-1)[real] > 1e-4).mean() > 0.9
    last = real.sum(1) - 1  # the last word of each text is seen by the first
    tokens[np.arange(16), last] += 1
    tokens %= 500
    assert (abs(forward(model, tokens, reads(batch)) - before)[:, 0].max(-1) > 1e-4).all()


def test_a_bert_writes_no_text():
    run = bert_run(model={"n_layers": 1})
    with pytest.raises(ConfigError, match="family='bert' writes no text"):
        generate(build(run.model, tiny_layout(run)), ["x"])


CASES = [
    pytest.param(name, style, marks=[] if (name, style) in FAST else pytest.mark.slow)
    for name in LAYOUTS
    for style in ("post", "pre")
]


@pytest.mark.parametrize(("name", "style"), CASES)
def test_every_layout_trains_as_one_device_does(name, style):
    losses, params = train(style, name)
    expected_losses, expected_params = alone(style)
    assert len({*losses}) == STEPS
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert params.keys() == expected_params.keys()
    for path, value in params.items():
        np.testing.assert_allclose(value, expected_params[path], rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_all_weights_are_trained():
    before = named(nnx.state(build(bert_run().model, tiny_layout(bert_run())), nnx.Param))
    after = alone("post")[1]
    for path in before.keys() - {"blocks.attention.k_bias"}:  # which softmax cancels
        assert (abs(after[path] - before[path]) > 1e-5).any(), path


@pytest.mark.slow
def test_an_encoder_without_heads_trains():
    losses, _ = train("encoder", "fsdp_tp")
    np.testing.assert_allclose(losses, train("encoder", "single")[0], rtol=1e-5)


@functools.cache
def alone(style):
    return train(style, "single")


def train(style, name):
    """Losses and last weights. Alone: without microbatches, which change no number either."""
    sizes = LAYOUTS.get(name, {})
    run = bert_run(style, model={"dropout": 0.1}, accumulate=1 if name == "single" else 4)
    run = bert_run(style, model={"dropout": 0.1}, accumulate=2) if sizes.get("dp") == 8 else run
    layout = tiny_layout(run, **sizes)
    steps, losses = make_steps(run, layout), []
    state = steps.init()
    for seed in range(STEPS):
        state, metrics = steps.train(state, placed(bert_batch(run, seed), layout))
        assert metrics["applied"]
        losses.append(float(metrics["loss"]))
    nats, weight = steps.evaluate(state.params, placed(bert_batch(run, 9), layout))
    return [*losses[1:], float(nats / weight)], named(state.params)


def placed(batch, layout):
    rows = {name: x for name, x in batch.items() if x.ndim == 2}
    others = {
        name: jax.device_put(x, layout.sharding("batch"))
        for name, x in batch.items()
        if x.ndim == 1
    }
    return place(rows, layout) | others
