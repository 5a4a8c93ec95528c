"""One step from the same weights and batch: loss and gradients are those of torch."""

import jax
import numpy as np
import pytest
from flax import nnx

from mlm_jax.checkpoint.hf import from_hf
from mlm_jax.losses import next_token_nats
from tests.conftest import named, place

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
MAKES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "gemma2": (
        transformers.Gemma2Config, transformers.Gemma2ForCausalLM,
        {"head_dim": 16, "sliding_window": 8, "attn_implementation": "eager"},
    ),
    "gpt_neox": (
        transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM,
        {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "make", ["llama", *(pytest.param(m, marks=pytest.mark.slow) for m in ("gemma2", "gpt_neox"))]
)
def test_loss_and_gradients_are_those_of_torch(make, tmp_path):
    config, kind, more = MAKES[make]
    torch.manual_seed(0)
    theirs = kind(config(**SIZES, **more, initializer_range=0.1)).train()
    theirs.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    rows = rng.integers(0, SIZES["vocab_size"], (4, 25))
    weights = rng.random((4, 24)) < 0.7
    logits = theirs(torch.tensor(rows[:, :-1])).logits
    labels = torch.tensor(np.where(weights, rows[:, 1:], -100))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    for weight in theirs.parameters():  # gradients go the way of weights
        weight.data = weight.grad
    theirs.save_pretrained(tmp_path / "gradients")

    model = from_hf(tmp_path / "model")
    graphdef, params = nnx.split(model, nnx.Param)
    batch = {
        "tokens": rows[:, :-1].astype("int32"), "targets": rows[:, 1:].astype("int32"),
        "weights": weights.astype("float32"),
    }  # fmt: skip

    def mean(params, batch):
        nats = next_token_nats(nnx.merge(graphdef, params), batch, None)
        return nats.objective / batch["weights"].sum()

    found, grads = jax.jit(jax.value_and_grad(mean))(params, place(batch, model.layout))
    assert float(found) == pytest.approx(loss.item(), rel=1e-5)
    expected = named(nnx.state(from_hf(tmp_path / "gradients"), nnx.Param))
    for name, ours in named(grads).items():
        assert np.abs(ours - expected[name]).max() < 1e-4 * np.abs(expected[name]).max(), name
