"""Documents that share a row do not know of each other: proved by gradients, which are exactly 0.

Every place of a row is read as a token of its own, so that row k of the gradient by the embedding
table is what the loss has from place k, through attention or however else.
"""

import jax
import numpy as np
import pytest
from flax import nnx

from mlm_jax.data.objectives.chat import ChatTemplate
from mlm_jax.data.objectives.examples import conversation_text, encode
from mlm_jax.data.objectives.packing import PackedExamples
from mlm_jax.data.objectives.windows import causal
from mlm_jax.data.tokenizer.training import train_bpe
from mlm_jax.losses import next_token_nats
from mlm_jax.models import build
from tests.conftest import STYLES, tiny_layout, tiny_run
from tests.data.chat_templates import turns

T = 48


def window(apart: bool = True):
    """Four documents, of which the first and the last are cut by the window."""
    rng = np.random.default_rng(0)
    pieces = [rng.integers(1, 500, n) for n in (9, 1, 22, T + 1 - 9 - 1 - 22)]
    return causal(pieces, apart=apart, reset_positions=apart, mask_boundaries=apart)


def packed_chats():
    """Conversations side by side, and what is left of the row."""
    tokenizer = train_bpe([], 300, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    said = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    chats = [turns("hi", "ho", "why?", "so"), turns("a", "b"), turns("question", "answer")]
    texts = [conversation_text(ChatTemplate(said), chat) for chat in chats]
    packed = PackedExamples(encode(texts, tokenizer), T)
    assert len(packed) == 1
    return packed.row(0)


ROWS = {"window": window, "packed chats": packed_chats}


@pytest.fixture(scope="module", params=STYLES)
def model(request):
    untied = {**STYLES[request.param], "tied": False, "seq_len": T}  # the table is only read from
    run = tiny_run(request.param, model=untied, train={"global_batch_size": 1})
    return build(run.model, tiny_layout(run))


@pytest.fixture(scope="module")
def influence(model):
    """float32 [T]: size of the gradient of a row's weighted loss by what is read at each place."""
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def gradient(params, batch):
        def nats(params):
            return next_token_nats(nnx.merge(graphdef, params), batch, None).objective

        return abs(jax.grad(nats)(params)["embedding"]["tokens"][...]).max(-1)[:T]

    def influence(row, weights):
        given = {**row, "tokens": np.arange(T, dtype=np.int32), "weights": weights}
        return np.asarray(gradient(params, {name: x[None] for name, x in given.items()}))

    return influence


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ROWS)
def test_no_token_of_another_document_has_any_influence(kind, influence):
    row = ROWS[kind]()
    segments = row["segments"]
    trained = [d for d in np.unique(segments) if row["weights"][segments == d].any()]
    assert len(trained) >= 3
    for document in trained:
        own = segments == document
        felt = influence(row, np.where(own, row["weights"], 0).astype(np.float32))
        assert (felt[~own] == 0).all()
        last = np.flatnonzero(own & (row["weights"] > 0))[-1]
        assert (felt[own & (np.arange(T) <= last)] > 0).all()


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ROWS)
def test_a_document_has_the_logits_it_has_alone(kind, model):
    row = ROWS[kind]()
    forward = jax.jit(lambda model, tokens, **where: model(tokens, **where))
    where = {f"{name}_BT": row[name][None] for name in ("segments", "positions")}
    packed = forward(model, row["tokens"][None], **where)[0]
    for document in np.unique(row["segments"]):
        own = row["segments"] == document
        alone = np.zeros((1, T), np.int32)  # what follows it, nothing in it sees
        alone[0, : own.sum()] = row["tokens"][own]
        np.testing.assert_allclose(
            forward(model, alone)[0, : own.sum()], packed[own], atol=1e-5, rtol=0
        )


def test_with_attention_across_documents_they_do_influence_each_other(influence):
    apart, together = window(), window(apart=False)
    last = apart["segments"] == apart["segments"].max()
    weights = last.astype(np.float32)
    assert (influence(apart, weights)[~last] == 0).all()
    assert (influence(together, weights)[~last] > 0).any()


def test_what_a_boundary_would_predict_is_not_trained(influence):
    """The loss of a whole row has nothing from a document's last token, which predicts nothing."""
    row = window()
    ends = np.flatnonzero(np.diff(row["segments"]))
    assert (influence(row, row["weights"])[ends] == 0).all()
    everything = np.ones(T, np.float32)
    assert (influence(row, everything)[ends] > 0).all()
