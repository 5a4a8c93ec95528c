import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.layers.dropout import dropout, sample_keys
from mlm_jax.layers.order import places
from tests.collectives import collectives
from tests.conftest import LAYOUTS, tiny_layout, tiny_run

PLACES = jnp.arange(16)
CONTEXT = {"cp": {"dp": 2, "cp": 4}, "cp_tp_sp": {"cp": 4, "tp": 2, "sequence_parallel": True}}


def masks(seed=3, step=0, layer=0, site="mlp", rows=range(8), rate=0.25):
    keys = sample_keys(seed, jnp.int32(step), jnp.array(list(rows), jnp.uint32))
    return np.asarray(dropout(jnp.ones((len(rows), 16, 64)), rate, keys, PLACES, layer, site))


def test_dropout_drops_its_share_and_scales_the_rest():
    x = masks(rows=range(64))
    assert (x == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert set(np.unique(x)) == {0, np.float32(1 / 0.75)}
    ones = jnp.ones((2, 3, 4))
    assert dropout(ones, 0.5, None, PLACES, 0, "mlp") is ones


def test_dropout_masks_differ_by_seed_step_sample_layer_and_site():
    found = [masks(), masks(seed=4), masks(step=1), masks(layer=1), masks(site="attention")]
    found += [masks(site="embedding"), masks(rows=range(8, 16))]
    alike = [(a == b).mean() for i, a in enumerate(found) for b in found[:i]]
    assert max(alike) < 0.7  # by chance 0.75^2 + 0.25^2 = 0.625
    drawn = masks(rows=range(32))
    assert len({row.tobytes() for row in drawn}) == 32
    assert len({token.tobytes() for row in drawn for token in row}) == 32 * 16


@pytest.mark.parametrize("name", LAYOUTS | CONTEXT)
def test_dropout_masks_are_the_same_under_layouts_and_microbatches(name):
    expected = masks()
    layout = tiny_layout(tiny_run(), **(LAYOUTS | CONTEXT)[name])
    order = layout.order(16)

    @jax.jit
    def drop(x, rows):
        x = layout.constrain(x, "batch", "residual_seq", None)
        y = dropout(x, 0.25, sample_keys(3, jnp.int32(0), rows), places(layout, 16), 0, "mlp")
        return layout.constrain(y, "batch", "residual_seq", None)

    split = jax.device_put(jnp.ones((8, 16, 64)), layout.sharding("batch", "residual_seq", None))
    rows = jnp.arange(8, dtype=jnp.uint32)
    np.testing.assert_array_equal(drop(split, rows), expected[:, order])
    np.testing.assert_array_equal(masks(rows=range(1, 8, 2)), expected[1::2])  # a microbatch
    assert collectives(drop.lower(split, rows).compile().as_text()) == []
