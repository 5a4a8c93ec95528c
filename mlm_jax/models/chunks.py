"""The layers of a pipeline's stages: where a device stores them, and where it works on them.

A device stores layers in a row, as every layout does, and a checkpoint knows none. With several
chunks a stage these are not the ones that it works on: so weights go round once before a step, and
their gradients after it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from mlm_jax.layout import Layout

Tree = Any


def to_chunks(blocks: Tree, layout: Layout) -> Tree:
    """This stage's chunks [v, L / p v, ...] of the layers [L / p, ...] that it stores."""
    v = layout.chunks
    parts = jax.tree.map(lambda w: w.reshape(v, -1, *w.shape[1:]), blocks)
    return parts if v == 1 else _exchanged(parts, exchanges(layout.mesh.shape["pp"], v))


def to_blocks(chunks: Tree, layout: Layout) -> Tree:
    """The inverse of `to_chunks`."""
    p, v = layout.mesh.shape["pp"], layout.chunks
    if v > 1:
        back = [[(b, to, a, at) for a, at, b, to in moves] for moves in exchanges(p, v)]
        chunks = _exchanged(chunks, back)
    return jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), chunks)


Move = tuple[int, int, int, int]  # from a device's part, to another's part


def exchanges(p: int, v: int) -> list[list[Move]]:
    """v rounds that bring virtual stage s from device s // v, which stores it, to s mod p.

    In each, every device sends one part and receives one: a permutation. A graph whose nodes all
    have v edges falls into v perfect matchings (König 1916).
    """
    left = list(range(p * v))
    rounds = []
    for _ in range(v):
        edges = {(s // v, s % p): s for s in left}
        graph = csr_array((np.ones(len(edges)), np.array(list(edges)).T), shape=(p, p))
        workers = maximum_bipartite_matching(graph, perm_type="column")
        moved = [edges[stored, int(worker)] for stored, worker in enumerate(workers)]
        rounds.append([(s // v, s % v, s % p, s // p) for s in moved])
        left = [s for s in left if s not in moved]
    return rounds


def _exchanged(parts: Tree, rounds: list[list[Move]]) -> Tree:
    """Every part [v, ...] of a tree after these moves between devices."""
    device = jax.lax.axis_index("pp")

    def exchanged(x: jax.Array) -> jax.Array:
        new = jnp.zeros_like(x)
        for moves in rounds:
            take, put = np.zeros((2, len(moves)), int)
            for a, at, b, to in moves:
                take[a], put[b] = at, to
            came = jax.lax.ppermute(
                x[jnp.asarray(take)[device]], "pp", [(a, b) for a, _, b, _ in moves]
            )
            new = new.at[jnp.asarray(put)[device]].set(came)
        return new

    return jax.tree.map(exchanged, parts)
