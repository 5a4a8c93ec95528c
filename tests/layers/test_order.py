"""The order in which sequences are held, and how they come into it."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mlm_jax.errors import LayoutError
from mlm_jax.layers.order import in_order, out_of_order, places
from mlm_jax.layout import Layout
from tests.collectives import collectives
from tests.conftest import tiny_run


def layout_of(**sizes):
    return Layout.create(jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)


def test_a_device_holds_an_early_and_a_late_part():
    assert layout_of(cp=2).order(8).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert layout_of(cp=3).order(6).tolist() == [0, 5, 1, 4, 2, 3]
    assert layout_of(dp=2).order(5).tolist() == [0, 1, 2, 3, 4]  # nothing splits it
    assert layout_of(cp=2).generating(tiny_run().model).order(5).tolist() == [0, 1, 2, 3, 4]
    assert places(layout_of(cp=2), 8).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


def test_a_length_that_does_not_split_is_refused_with_those_that_do():
    with pytest.raises(LayoutError, match=r"30 tokens .* layout\.cp=4 .* try 24 or 32"):
        layout_of(cp=4).order(30)
    with pytest.raises(LayoutError, match=r"3 tokens .* try 4, or another layout"):
        layout_of(cp=2).order(3)


def test_a_batch_comes_into_order_without_being_sent():
    layout = layout_of(dp=2, cp=4)
    x = jax.device_put(np.arange(2 * 48).reshape(2, 48), layout.sharding("batch", None))
    ordered = jax.jit(lambda x: in_order(x, layout))
    assert collectives(ordered.lower(x).compile().as_text()) == []
    assert ordered(x).sharding.spec == P("dp", "cp")
    assert np.array_equal(ordered(x), np.asarray(x)[:, layout.order(48)])
    assert np.array_equal(out_of_order(ordered(x), layout), x)
