"""What a T5 writes is what transformers' has it write: greedy, and by beams; and a GPT's beams."""

import numpy as np
import pytest

from mlm_jax.errors import ConfigError
from mlm_jax.inference.engine import Sampling, generate_ids
from mlm_jax.models import build
from tests.conftest import tiny_layout, tiny_run
from tests.models.t5_reference import KINDS, ours_like, padded_batch, transformers_t5
from tests.models.test_t5 import t5_run

GREEDY = Sampling(0)
DRAW = Sampling(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1)
NEW = 64


SLOW = pytest.mark.slow


@pytest.fixture(
    scope="module", params=[pytest.param(k, marks=() if k == "v1.0" else SLOW) for k in KINDS]
)
def pair(request):
    pytest.importorskip("transformers")
    theirs = transformers_t5(request.param, seed=3)
    return theirs, ours_like(request.param, theirs, tiny_layout(tiny_run()))


def prompts_of(batch):
    pairs = zip(batch["tokens"], batch["segments"], strict=True)
    return [row[: mask.sum()].tolist() for row, mask in pairs]


def transformers_writes(theirs, batch, eos, **more):
    import torch

    theirs.generation_config.eos_token_id = eos
    out = theirs.generate(
        input_ids=torch.from_numpy(batch["tokens"]).long(),
        attention_mask=torch.from_numpy(batch["segments"]),
        max_new_tokens=NEW, do_sample=False, use_cache=False, **more,  # 5.24 takes n_layers for it
    ).tolist()  # fmt: skip
    return [row[1 : row.index(eos, 1) if eos in row[1:] else None] for row in out]


def an_end(theirs, batch):
    """A token that ends some texts early: the last new one of the longest free text."""
    free = transformers_writes(theirs, batch, 1)
    return max(max((row.index(t), t) for t in set(row)) for row in free)[1]


def test_greedy_is_transformers(pair):
    theirs, ours = pair
    batch = padded_batch(4, 40)
    eos = an_end(theirs, batch)
    expected = transformers_writes(theirs, batch, eos)
    got = generate_ids(ours, prompts_of(batch), max_tokens=NEW, sampling=GREEDY, eod_id=eos)
    assert got == expected
    assert len({tuple(row) for row in got}) > 1


@pytest.mark.parametrize("penalty", [1.0, *(pytest.param(x, marks=SLOW) for x in (0.2, 2.0))])
def test_beams_are_transformers(pair, penalty):
    theirs, ours = pair
    batch = padded_batch(4, 40, seed=1)
    eos = an_end(theirs, batch)
    expected = transformers_writes(theirs, batch, eos, num_beams=4, length_penalty=penalty)
    how = {"max_tokens": NEW, "sampling": GREEDY, "eod_id": eos, "length_penalty": penalty}
    if penalty == 1.0:
        assert expected != transformers_writes(theirs, batch, eos)  # not what greedy finds
    assert generate_ids(ours, prompts_of(batch), beams=4, **how) == expected


@pytest.mark.slow
def test_a_gpts_beams_are_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        initializer_range=0.3, tie_word_embeddings=False, rms_norm_eps=1e-5,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    run = tiny_run(model={
        "n_layers": 2, "d_model": 32, "d_mlp": 48, "vocab_size": 100, "seq_len": 64, "bias": False,
        "norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "tied": False,
    })  # fmt: skip
    model = build(run.model, tiny_layout(run))
    part = {name: w.detach().numpy() for name, w in theirs.named_parameters()}
    turned = lambda name: np.stack(  # noqa: E731
        [part[f"model.layers.{i}.{name}.weight"].T for i in range(2)]
    )
    pad = lambda x: np.pad(x, ((0, 28), (0, 0)))  # noqa: E731
    b = model.blocks
    model.embedding.tokens[...] = pad(part["model.embed_tokens.weight"])
    model.head.weight[...] = pad(part["lm_head.weight"])
    for x in "qkvo":
        getattr(b.attention, x)[...] = turned(f"self_attn.{x}_proj")
    for x in ("up", "gate", "down"):
        getattr(b.mlp, x)[...] = turned(f"mlp.{x}_proj")
    prompts = [[5, 6, 7, 8, 9], [50, 51, 52, 53, 54]]
    for eos in (3, 11):
        out = theirs.generate(
            torch.tensor(prompts), attention_mask=torch.ones(2, 5), max_new_tokens=24,
            num_beams=3, do_sample=False, eos_token_id=eos, pad_token_id=0,
        ).tolist()  # fmt: skip
        expected = [row[5:] for row in out]
        expected = [row[: row.index(eos)] if eos in row else row for row in expected]
        got = generate_ids(model, prompts, max_tokens=24, sampling=GREEDY, eod_id=eos, beams=3)
        assert got == expected


@pytest.mark.slow
def test_layouts_write_the_same():
    run = t5_run("v1.1", target_len=64)
    prompts = prompts_of(padded_batch(3, 20))
    found = []
    for sizes in ({}, {"dp": 2, "fsdp": 2, "tp": 2}):
        model = build(run.model, tiny_layout(run, **sizes))
        how = {"max_tokens": 12, "eod_id": 1}
        drawn = generate_ids(model, prompts, sampling=DRAW, seed=3, **how)
        found.append((drawn, generate_ids(model, prompts, sampling=GREEDY, beams=3, **how)))
    assert found[0] == found[1]


@pytest.mark.slow
def test_layers_in_one_stack_write_the_same(monkeypatch):
    from mlm_jax.inference import engine

    run = t5_run("v1.1", target_len=64)
    model, prompts = build(run.model, tiny_layout(run)), prompts_of(padded_batch(2, 20))
    how = {"max_tokens": 8, "sampling": GREEDY, "beams": 2}
    expected = generate_ids(model, prompts, **how)
    monkeypatch.setattr(engine, "layers_apart", lambda model: False)
    engine.prefill.clear_cache()
    try:
        assert generate_ids(model, prompts, **how) == expected
    finally:
        engine.prefill.clear_cache()


@pytest.fixture(scope="module")
def tiny():
    run = t5_run()
    return build(run.model, tiny_layout(run))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompts": [[1] * 25]}, "prompt 0 has 25 tokens"),
        ({"max_tokens": 17}, "model.target_len=16.*try max_tokens=16"),
        ({"beams": 0}, "beams=0 must be from 1 to 50"),
        ({"beams": 51}, "beams=51"),
        ({"beams": 2, "sampling": Sampling(0.8)}, "temperature=0.8 does nothing with beams=2"),
        ({"beams": 2, "length_penalty": float("nan")}, "length_penalty=nan"),
        ({"length_penalty": 2.0}, "does nothing without beams"),
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_is_refused(wrong, says, tiny):
    how = {"prompts": [[2, 3]], "max_tokens": 4, "sampling": GREEDY} | wrong
    with pytest.raises(ConfigError, match=says):
        generate_ids(tiny, how.pop("prompts"), **how)
