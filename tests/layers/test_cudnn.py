"""cuDNN's attention beside axes split by hand; its place is taken by XLA's, which CPUs have."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mlm_jax.layers.cudnn import by_device
from mlm_jax.layout import Layout

B, T, N, H = 8, 16, 4, 8


@pytest.mark.parametrize("kv_heads", [pytest.param(4, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "sizes",
    [pytest.param({"dp": 4}, marks=pytest.mark.slow), {"dp": 2, "fsdp": 2, "tp": 2}],
    ids=str,
)
def test_within_a_shard_map_over_dp_and_a_scan_it_has_the_same_gradients(sizes, kv_heads):
    layout = Layout.create(jax.devices()[: 4 if len(sizes) == 1 else 8], **sizes)
    kernel = partial(jax.nn.dot_product_attention, is_causal=True)
    inside = by_device(kernel, layout.inside("dp"))
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(B, T, n, H) for n in (N, kv_heads, kv_heads)]
    qkv = [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]

    def loss(attend, q, k, v):
        layer = lambda x, _: (jnp.sin(x + attend(x, k, v)), None)  # noqa: E731
        return jnp.square(jax.lax.scan(layer, q, jnp.arange(3))[0]).sum()

    by_hand = jax.shard_map(
        jax.value_and_grad(partial(loss, inside), (0, 1, 2)), mesh=layout.mesh,
        in_specs=(P("dp"),) * 3, out_specs=(P(), P("dp")), axis_names={"dp"}, check_vma=False,
    )  # fmt: skip
    _, grads = jax.jit(by_hand)(*qkv)
    _, expected = jax.jit(jax.value_and_grad(partial(loss, kernel), (0, 1, 2)))(*qkv)
    for g, e in zip(grads, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-5)
