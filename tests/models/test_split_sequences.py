"""A model whose sequences are split, as its users see it."""

import jax
import numpy as np
import pytest

from mlm_jax.errors import ConfigError
from mlm_jax.models import build, declare
from tests.conftest import tiny_batch, tiny_layout, tiny_run


def test_a_model_takes_and_gives_tokens_in_the_order_of_the_text():
    run = tiny_run("llama", train={"global_batch_size": 2})
    batch = tiny_batch(run, packed=True)
    rows = {f"{name}_BT": batch[name] for name in ("segments", "positions")}
    found = []
    for sizes in ({}, {"cp": 4}):
        model = build(run.model, tiny_layout(run, **sizes))
        call = jax.jit(lambda model, tokens, rows: (model(tokens, **rows), model(tokens)))
        found.append(call(model, batch["tokens"], rows))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(found[0][0] - found[0][1]).max() > 0.1


def test_cudnn_is_refused_where_sequences_are_split():
    cross = {"cross_document_attention": True}
    run = tiny_run(model={"attention": "cudnn", "dtype": "bfloat16"}, data=cross)
    with pytest.raises(ConfigError, match=r"layout\.cp=2 splits; try .*'auto', or layout\.cp=1"):
        declare(run.model, tiny_layout(run, cp=2))
