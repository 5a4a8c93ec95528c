"""What context parallelism costs and saves, read from the compiled train step.

python tests/models/test_context_costs.py prints its memory for a longer sequence.
"""

import math
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from mlm_jax.step import make_steps
from tests.collectives import collectives
from tests.conftest import tiny_layout, tiny_run

L, B, T = 3, 4, 32


def compiled(style="llama", *, model=None, rows=B, remat="none", packed=False, chunks=1, **sizes):
    run = tiny_run(
        style,
        model={"n_layers": L, "n_heads": 8, "dropout": 0.1, **(model or {})},
        train={"global_batch_size": rows, "remat": remat, "loss_chunks": chunks},
    )
    layout = tiny_layout(run, **sizes)
    steps = make_steps(run, layout)
    names = ["tokens", "targets", *(("segments", "positions") if packed else ())]
    kinds = dict.fromkeys(names, jnp.int32) | {"weights": jnp.float32}
    placed, shape = layout.sharding("batch", None), (rows, run.model.seq_len)
    batch = {k: jax.ShapeDtypeStruct(shape, d, sharding=placed) for k, d in kinds.items()}
    return steps.train.lower(steps.abstract, batch).compile()


@cache
def sent(**settings):
    """Collectives of a train step, those in the scan over layers apart."""
    found = collectives(compiled(**settings).as_text())
    return [c for c in found if c.looped], [c for c in found if not c.looped]


def counted(ops):
    """How many a layer: those of a loop in a layer are as many as it has turns."""
    found = Counter()
    for c in ops:
        found["backward" if c.backward else "forward", c.kind] += c.times / (L if c.looped else 1)
    return found


def exchanged(ops):
    """What attention sends, and the rest."""
    own = [c for c in ops if "attention/shard_map" in c.op_name]
    return own, [c for c in ops if c not in own]


@pytest.mark.parametrize(
    ("n", "packed"),
    [(4, True), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((2, False), (8, True)))],
)
def test_keys_and_values_go_round_once_forward_and_once_backward(n, packed):
    layer, outside = sent(cp=n, packed=packed)
    ring, rest = exchanged(layer)
    keys = [c for c in ring if c.shapes == ((2, B, 2, T // n // 2, 8),)]  # 2 heads, not all 8
    assert counted(keys) == {
        ("forward", "collective-permute"): 2 * (n - 1),  # k, v
        ("backward", "collective-permute"): 4 * (n - 1),  # and their gradients
    }
    assert counted(rest) == {("backward", "all-reduce"): 1}  # of gradients of weights
    more, outside = exchanged(outside)
    segments = [c for c in ring + more if c not in keys]
    assert {c.shapes for c in segments} == ({((2, B, T // n // 2),)} if packed else set())
    # They are the same in every layer: forward they go round once, before the first.
    assert sum(c.times for c in segments if not c.backward) == (n - 1 if packed else 0)
    assert sum(c.times for c in segments if c.backward) <= L * (n - 1)
    assert {c.kind for c in outside} == {"all-reduce"}
    assert all(math.prod(shape) != B * T // n * 64 for c in outside for shape in c.shapes)  # h


@pytest.mark.slow
def test_gathered_keys_and_values_are_sent_twice_and_their_gradients_scattered():
    layer, outside = sent(cp=4, cp_attention="all_gather", packed=True)
    own, rest = exchanged(layer)
    assert counted(own) == {
        ("forward", "all-gather"): 2,
        ("backward", "all-gather"): 2,
        ("backward", "reduce-scatter"): 2,
    }
    assert counted(rest) == {("backward", "all-reduce"): 1}
    segments, outside = exchanged(outside)
    assert counted(segments) == {("forward", "all-gather"): 1}
    assert {c.kind for c in outside} == {"all-reduce"}


@pytest.mark.slow
def test_the_loss_in_chunks_sends_a_number_a_chunk_and_one_gradient():
    layer, outside = sent(cp=4, chunks=2)
    in_loss = [c for c in layer if "jvp(head)" in c.op_name]
    assert [(c.kind, c.shapes, c.times) for c in in_loss] == [("all-reduce", ((),), 2)]
    tables = [shape for c in outside for shape in c.shapes if shape == (512, 64)]
    assert len(tables) == 2  # gradients of the embedding and of the head, once a step


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp_sp"])
def test_beside_the_ring_tensor_parallelism_sends_what_it_always_does(sequence_parallel):
    layer, _ = sent(cp=2, tp=2, sequence_parallel=sequence_parallel)
    ring, rest = exchanged(layer)
    assert counted(ring) == {
        ("forward", "collective-permute"): 2,
        ("backward", "collective-permute"): 4,
    }
    assert {c.shapes for c in ring} == {((2, B, 1, T // 4, 8),)}  # a device's own head
    residual = [c for c in rest if c.shapes[0] == (B, T // 2, 64)]  # its own part of sequences
    kinds = ("all-gather", "reduce-scatter") if sequence_parallel else ("all-reduce",)
    assert counted(residual) == {
        (way, kind): 2 for way in ("forward", "backward") for kind in kinds
    }
    gradients = [c for c in rest if c not in residual]
    assert {(c.kind, c.backward) for c in gradients} == {("all-reduce", True)}


def temporary(n, seq_len, remat, cp_attention=None):
    how = {"cp_attention": cp_attention} if n > 1 else {}
    step = compiled(
        model={"seq_len": seq_len}, rows=2, remat=remat, packed=True, chunks=4, cp=n, **how
    )
    return step.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("cp_attention", ["ring", "all_gather"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_memory_of_a_long_sequence_falls_by_cp(remat, cp_attention):
    """Of the rest, weights and their gradients, a device holds as much whatever cp is."""
    whole = temporary(1, 1024, remat)
    for n in (4, 8):
        assert temporary(n, 1024, remat, cp_attention) < 1.25 * whole / n


if __name__ == "__main__":
    print("MiB of temporary memory at 2 x 2048 tokens, packed, on cp = 1, 2, 4, 8")
    for remat in ("none", "full"):
        for how in ("ring", "all_gather"):
            sizes = [temporary(n, 2048, remat, how) / 2**20 for n in (1, 2, 4, 8)]
            print(f"{remat:5} {how:11}" + "".join(f"{size:8.1f}" for size in sizes), flush=True)
