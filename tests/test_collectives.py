"""What tensor and sequence parallelism send: Megatron's pattern, counted in the compiled step."""

import math
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from mlm_jax.step import make_steps
from tests.collectives import collectives
from tests.conftest import tiny_layout, tiny_run

L, B, T, D, V, TP = 3, 8, 32, 64, 16000, 4  # V: a table, or logits, dwarf everything else
RESIDUAL = 4 * B * T * D  # bytes, float32


@cache
def sent(style, sequence_parallel, remat, n_kv_heads=4):
    """Collectives of a train step on TP devices, those in the scan over layers apart."""
    run = tiny_run(
        style,
        model=dict(n_layers=L, n_heads=8, n_kv_heads=n_kv_heads, vocab_size=V),
        train=dict(global_batch_size=B, remat=remat),
    )
    layout = tiny_layout(run, tp=TP, sequence_parallel=sequence_parallel)
    steps = make_steps(run, layout)
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    rows = layout.sharding("batch", None)
    batch = {k: jax.ShapeDtypeStruct((B, T), d, sharding=rows) for k, d in kinds.items()}
    found = collectives(steps.train.lower(steps.abstract, batch).compile().as_text())
    return [c for c in found if c.looped], [c for c in found if not c.looped]


def counted(ops):
    return Counter(("backward" if c.backward else "forward", c.kind) for c in ops)


@pytest.mark.parametrize("remat", ["none", "selective"])
@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_a_layer_under_tp_pays_two_all_reduces_each_way(style, remat):
    layer, _ = sent(style, False, remat)
    assert all(c.times == L for c in layer)
    assert counted(layer) == {("forward", "all-reduce"): 2, ("backward", "all-reduce"): 2}
    assert not any(c.recomputed for c in layer)  # selective keeps what was sent
    assert all(shape == (B, T, D) for c in layer for shape in c.shapes)
    # Backward, the gradients by way of q, k and v (up and gate) are to be added. XLA:CPU sends them
    # side by side in one operation, XLA:GPU adds them first and sends one.
    assert sorted(len(c.shapes) for c in layer) == [1, 1, *{"gpt2": (1, 3), "llama": (2, 3)}[style]]


@pytest.mark.parametrize("remat", ["none", "selective"])
@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_a_layer_under_sp_gathers_and_scatters_instead(style, remat):
    layer, _ = sent(style, True, remat)
    assert all(c.times == L for c in layer)
    norm_gradients = [c for c in layer if c.kind == "all-reduce"]
    again = [c for c in layer if c.recomputed]
    rest = [c for c in layer if c not in norm_gradients + again]
    assert counted(rest) == {
        ("forward", "all-gather"): 2, ("forward", "reduce-scatter"): 2,
        ("backward", "all-gather"): 2, ("backward", "reduce-scatter"): 2,
    }  # fmt: skip
    assert all(shape == (B, T, D) for c in rest for shape in c.shapes)
    # Selective remat keeps a norm's input, not the gathered result: Megatron gathers it again too.
    assert [(c.kind, c.shapes) for c in again] == [("all-gather", ((B, T, D),))] * (
        2 if remat == "selective" else 0
    )
    # Each device has seen a part of the sequence, so the gradients of norms are added up.
    vectors = 4 if style == "gpt2" else 2  # a scale and a bias for each of two norms, or a scale
    assert [c.shapes for c in norm_gradients] == [((D,),) * vectors]
    assert all(c.backward for c in norm_gradients)
    names = norm_gradients[0].op_name.rstrip(")").split(":")  # of both norms, made one by XLA
    assert all(name.endswith("reduce_sum") for name in names)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp_sp"])
@pytest.mark.parametrize("remat", ["none", "selective"])
@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_nothing_as_large_as_logits_or_the_embedding_is_sent(style, remat, sequence_parallel):
    layer, outside = sent(style, sequence_parallel, remat)
    logits_shard, table_shard = 4 * B * T * V // TP, 4 * V * D // TP
    assert max(c.bytes for c in layer + outside) < min(logits_shard, table_shard) / 4
    # Outside the layers: the embedding's lookup and the gradient by way of the logits, and under sp
    # a gather each way; all else, the loss and norms of gradients, is at most a number a token.
    large = [c for c in outside if max(map(math.prod, c.shapes)) > max(B * T, T * D)]
    assert all({math.prod(shape) for shape in c.shapes} <= {B * T * D, 1} for c in large)
    one = "reduce-scatter" if sequence_parallel else "all-reduce"
    expected = {("forward", one): 1, ("backward", one): 1}
    gathers = {("forward", "all-gather"): 1, ("backward", "all-gather"): 1}
    assert counted(large) == expected | (gathers if sequence_parallel else {})


def test_replicated_key_value_heads_send_their_gradients_and_no_more():
    layer, _ = sent("llama", False, "none", n_kv_heads=2)  # on tp 4
    residual = [c for c in layer if c.shapes[0] == (B, T, D)]
    assert counted(residual) == {("forward", "all-reduce"): 2, ("backward", "all-reduce"): 2}
    extra = [c for c in layer if c not in residual]
    assert extra
    assert all(c.backward for c in extra)
    heads = 4 * B * T * 2 * (D // 8)  # bytes of the gradient of k, or of v
    assert sum(c.bytes for c in extra) <= 4 * heads


HLO = """
HloModule a_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused_slice (param_0: s32[], param_1: f32[4,8]) -> f32[1,8] {
  %param_0 = s32[] parameter(0)
  %param_1 = f32[4,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%param_1, %param_0, %zero), dynamic_slice_sizes={1,8}
}

%fused_convert (param_0: f32[4,8]) -> bf16[4,8] {
  %param_0 = f32[4,8]{1,0} parameter(0)
  ROOT %convert = bf16[4,8]{1,0} convert(%param_0)
}

%inner (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[4,8]{1,0} all-gather(%p), dimensions={0}
}

%outer (p: f32[4,8]) -> f32[4,8] {
  %q = f32[4,8]{1,0} parameter(0)
  %sum = (f32[4,8]{1,0}, /*index=1*/f32[]) all-reduce(%q, %c), to_apply=%add, metadata={op_name="jit(f)/transpose(jvp())/dot"}
  %whole = f32[4,8]{1,0} get-tuple-element(%sum), index=0
  ROOT %w = f32[4,8]{1,0} while(%whole), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %i = s32[] partition-id()
  %summed = f32[4,8]{1,0} all-reduce(%a), to_apply=%add
  %narrow = bf16[4,8]{1,0} fusion(%summed), kind=kLoop, calls=%fused_convert
  %mine = f32[1,8]{1,0} fusion(%i, %narrow), kind=kLoop, calls=%fused_slice
  %ag = (f32[1,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%mine), dimensions={0}
  %done = f32[4,8]{1,0} all-gather-done(%ag)
  ROOT %w = f32[4,8]{1,0} while(%done), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_the_reader_multiplies_loops_and_sees_a_scatter_in_a_fusion():
    found = {(c.kind, c.shapes, c.bytes, c.times, c.looped, c.backward) for c in collectives(HLO)}
    assert found == {
        ("reduce-scatter", ((4, 8),), 128, 1, False, False),
        ("all-gather", ((4, 8),), 128, 1, False, False),
        ("all-reduce", ((4, 8), ()), 132, 3, True, True),
        ("all-gather", ((4, 8),), 64, 15, True, False),
    }
