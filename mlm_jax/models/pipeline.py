"""Pipeline parallelism: stages of layers on devices of their own, in one program for all of them.

The program is an island of `shard_map` that splits pp, dp and cp by itself and leaves fsdp and tp
to XLA. All devices run the same ticks: in each, a stage computes on what the stage before it sent
in the last one. Differentiation happens inside, and gradients are summed over dp and cp once.

p stages of v chunks each make p v virtual stages; chunk c of stage i is virtual stage c p + i. m
microbatches go through in groups of p, each group through a stage's chunks in order: operation k of
a stage is microbatch g p + r mod p in chunk r div p, where g, r = divmod(k, p v). At tick t stage i
is at forward operation t - i. So a result is used in the tick after it was sent, and a stage has
nothing to do in p - 1 of m v + p - 1 ticks: a bubble of (p - 1) / (v m) (Narayanan et al. 2021).

gpipe      v = 1, all forward operations and then JAX's own derivative of them (Huang et al. 2019)
circular   the same with v > 1
1f1b       a tick computes forward of one microbatch and backward of another, whose stage input it
           has kept in a ring: memory grows with p v and not with m. It computes a stage's forward
           again for its backward, as full recomputation does, in m v + p v + p - 2 ticks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from mlm_jax.layers.weight import wide
from mlm_jax.layout import Layout
from mlm_jax.models.chunks import to_blocks, to_chunks

AXES = ("pp", "dp", "cp")  # what the island splits by itself
Tree = Any


class Parts(NamedTuple):
    """What a pipeline computes, each of one microbatch. rest: the weights outside of blocks."""

    first: Callable[[Tree, Tree], jax.Array]  # (rest, microbatch) -> x
    blocks: Callable[[Tree, jax.Array, Tree, jax.Array], jax.Array]
    # (a chunk of blocks, x, microbatch, number of its first layer) -> x
    last: Callable[[Tree, jax.Array, Tree], tuple[jax.Array, Tree]]
    # (rest, x, microbatch) -> what is minimised, and what else is summed over the batch


class Place(NamedTuple):
    """Where a stage is at one tick: which operation, of which microbatch, in which chunk."""

    valid: jax.Array  # bool [], whether there is such an operation
    micro: jax.Array
    chunk: jax.Array
    forward: jax.Array  # number of the forward operation of the same microbatch and chunk


class Pipeline:
    """The ticks of one stage, from inside of the island."""

    def __init__(self, parts: Parts, layout: Layout, micros: Tree, remat: str):
        self.parts, self.micros, self.remat = parts, micros, remat
        self.p, self.v = layout.mesh.shape["pp"], layout.chunks
        self.m = jax.tree.leaves(micros)[0].shape[0]
        self.stage = jax.lax.axis_index("pp")

    def at(self, operation: jax.Array, backward: bool = False) -> Place:
        p, v, virtual = self.p, self.v, self.p * self.v
        valid = (operation >= 0) & (operation < self.m * v)
        group, r = jnp.divmod(jnp.clip(operation, 0, self.m * v - 1), virtual)
        chunk = v - 1 - r // p if backward else r // p
        micro = group * p + r % p
        return Place(valid, micro, chunk, group * virtual + chunk * p + r % p)

    def forward_place(self, tick: jax.Array) -> Place:
        return self.at(tick - self.stage)

    def backward_place(self, tick: jax.Array) -> Place:
        """The last virtual stage turns round at once: backward of k in the tick of forward k."""
        return self.at(tick - (self.p * self.v - 1) - (self.p - 1 - self.stage), backward=True)

    def is_first(self, place: Place) -> jax.Array:
        return (self.stage == 0) & (place.chunk == 0)

    def is_last(self, place: Place) -> jax.Array:
        return (self.stage == self.p - 1) & (place.chunk == self.v - 1)

    def micro(self, place: Place) -> Tree:
        return jax.tree.map(lambda x: x[place.micro], self.micros)

    def entering(self, rest: Tree, place: Place, micro: Tree, received: jax.Array) -> jax.Array:
        """What a stage works on: of the first virtual one the embedding, of others what came."""
        return jax.lax.cond(
            self.is_first(place),
            lambda: self.parts.first(rest, micro).astype(received.dtype),
            lambda: received,
        )

    def chunk(self, chunks: Tree, place: Place) -> Tree:
        return jax.tree.map(lambda w: w[0 if self.v == 1 else place.chunk], chunks)

    def run(self, chunk: Tree, x: jax.Array, place: Place, micro: Tree) -> jax.Array:
        n_layers = jax.tree.leaves(chunk)[0].shape[0]
        layer = (place.chunk * self.p + self.stage) * n_layers
        return self.parts.blocks(chunk, x, micro, layer)

    def sent(self, x: jax.Array, by: int) -> jax.Array:
        """What the stage before (by=1) or after (by=-1) has; round the ring for several chunks."""
        ring = [(i, (i + by) % self.p) for i in range(self.p)]
        if self.v == 1:  # the first stage has nothing to receive
            ring = [(i, j) for i, j in ring if j - i == by]
        return jax.lax.ppermute(x, "pp", ring)

    def nothing(self, rest: Tree) -> tuple[jax.Array, Tree, jax.Array]:
        """Zeros of what is minimised, of what else is summed, and of what a stage sends."""
        micro = jax.tree.map(lambda x: x[0], self.micros)
        x = jax.eval_shape(self.parts.first, rest, micro)
        shapes = (*jax.eval_shape(self.parts.last, rest, x, micro), x)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def loss(self, rest: Tree, chunks: Tree) -> tuple[jax.Array, Tree]:
        """Sums over the microbatches on this device, 0 elsewhere than on the last stage."""
        objective, sums, x = self.nothing(rest)

        def tick(received: jax.Array, t: jax.Array) -> Any:
            place = self.forward_place(t)
            micro = self.micro(place)
            x = self.entering(rest, place, micro, received)
            y = self.run(self.chunk(chunks, place), x, place, micro)
            onward = self.sent(y, 1)
            found = jax.lax.cond(
                self.is_last(place) & place.valid,
                lambda y: self.parts.last(rest, y, micro),
                lambda _: (objective, sums),
                after(y, onward),
            )
            return onward, found

        tick = jax.checkpoint(tick, prevent_cse=False) if self.remat == "full" else tick
        ticks = jnp.arange(self.m * self.v + self.p - 1)
        found = jax.lax.scan(tick, x, ticks)[1]
        return jax.tree.map(lambda x: x.sum(0), found)

    def loss_and_grads(self, rest: Tree, chunks: Tree) -> tuple[Tree, Tree]:
        """(sums, gradients of what is minimised by rest and chunks), by JAX's derivative."""
        by = jax.value_and_grad(lambda weights: self.loss(*weights), has_aux=True)
        (_, sums), grads = by((rest, chunks))
        return sums, grads

    def one_forward_one_backward(self, rest: Tree, chunks: Tree) -> tuple[Tree, Tree]:
        """The same, with the memory of 2 p v - 1 stage inputs whatever the microbatches."""
        _, sums, x = self.nothing(rest)
        kept = jnp.zeros((2 * self.p * self.v - 1, *x.shape), x.dtype)
        zeros = partial(jax.tree.map, lambda w: jnp.zeros(w.shape, wide(w.dtype)))

        def tick(carry: Any, t: jax.Array, fore: bool, back: bool) -> Any:
            came, went, kept, totals = carry
            if fore:
                came, kept = self.forward(t, rest, chunks, came, kept)
            if back:  # after it: the last stage turns round what it has kept in this very tick
                went, totals = self.backward(t, rest, chunks, went, kept, came, totals)
            return (came, went, kept, totals), None

        carry = (x, x, kept, (sums, zeros(rest), zeros(chunks)))
        first_back, last_fore = self.p * self.v - 1, self.m * self.v + self.p - 1
        phases = ((0, first_back, True, False), (first_back, last_fore, True, True),
                  (last_fore, last_fore + first_back, False, True))  # fmt: skip
        for start, stop, fore, back in phases:
            ticks = jnp.arange(start, stop)
            carry = jax.lax.scan(partial(tick, fore=fore, back=back), carry, ticks)[0]
        sums, *grads = carry[3]
        return sums, tuple(grads)

    def forward(
        self, t: jax.Array, rest: Tree, chunks: Tree, received: jax.Array, kept: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What came from the stage before, of this tick; and the inputs kept for backward."""
        place = self.forward_place(t)
        micro = self.micro(place)
        x = self.entering(rest, place, micro, received)
        slot = place.forward % len(kept)
        kept = kept.at[slot].set(jnp.where(place.valid, x, kept[slot]))
        return self.sent(self.run(self.chunk(chunks, place), x, place, micro), 1), kept

    def backward(
        self, t: jax.Array, rest: Tree, chunks: Tree, received: jax.Array, kept: jax.Array,
        came: jax.Array, totals: Any,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """What came back from the stage behind, of this tick; and sums and gradients so far.

        It waits for `came`, the last of this tick's forward.
        """
        place = self.backward_place(t)
        micro = self.micro(place)
        so_far, d_rest, d_chunks = totals
        run = lambda chunk, x: self.run(chunk, x, place, micro)  # noqa: E731
        x = after(kept[place.forward % len(kept)], came)
        y, transposed = jax.vjp(run, self.chunk(chunks, place), x)

        def turned(so_far: Tree, d_rest: Tree) -> Any:
            of = lambda rest, y: self.parts.last(rest, y, micro)  # noqa: E731
            (_, found), (d, dy) = jax.value_and_grad(of, (0, 1), has_aux=True)(rest, y)
            return optax.tree.add(so_far, found), optax.tree.add(d_rest, d), dy

        so_far, d_rest, dy = jax.lax.cond(
            self.is_last(place) & place.valid,
            turned, lambda *sums: (*sums, received), so_far, d_rest,
        )  # fmt: skip
        d_chunk, dx = transposed(jnp.where(place.valid, dy, 0))
        at = 0 if self.v == 1 else place.chunk
        d_chunks = jax.tree.map(lambda s, d: s.at[at].add(d), d_chunks, d_chunk)
        back = self.sent(dx, -1)

        def looked_up(d_rest: Tree, dx: jax.Array) -> Tree:
            of = lambda rest: self.parts.first(rest, micro).astype(dx.dtype)  # noqa: E731
            return optax.tree.add(d_rest, jax.vjp(of, rest)[1](dx)[0])

        d_rest = jax.lax.cond(
            self.is_first(place) & place.valid, looked_up, lambda d_rest, _: d_rest,
            d_rest, after(dx, back),
        )  # fmt: skip
        return back, (so_far, d_rest, d_chunks)


@jax.custom_vjp
def after(x: jax.Array, y: jax.Array) -> jax.Array:
    """x, which XLA cannot have before y, an array of the same shape; in backward the other way.

    XLA:CPU runs what does not depend on each other at once, and puts collectives in order, but not
    those of a `cond`: where one device is first in one and another in the other, both wait for
    ever. So what a tick sends, computes and sends is one chain.
    """
    return x + jnp.minimum(jnp.abs(y), 0)  # 0, but XLA does not know


after.defvjp(lambda x, y: (after(x, y), None), lambda _, g: (g, jnp.minimum(jnp.abs(g), 0)))


SCHEDULES = {
    "gpipe": Pipeline.loss_and_grads,
    "circular": Pipeline.loss_and_grads,
    "1f1b": Pipeline.one_forward_one_backward,
}


def pipelined_grads(
    parts: Parts, rest: Tree, blocks: Tree, micros: Tree, layout: Layout, remat: str
) -> tuple[Tree, tuple[Tree, Tree]]:
    """Sums over the batch, and the gradients of what is minimised by rest and by blocks.

    Of gradients each device of dp has its own rows' part: they gain a first dim of that size, which
    dp splits.

    blocks: stacked weights [L, ...], split over pp; rest: all others. micros: arrays [m],
    [m, B] and [m, B, T]. parts are called with a device's own part of all of these.
    """

    def island(rest: Tree, blocks: Tree, micros: Tree) -> Any:
        pipeline = Pipeline(parts, layout, micros, remat)
        grads_of = SCHEDULES[layout.pipeline]
        sums, (d_rest, d_chunks) = grads_of(pipeline, rest, to_chunks(blocks, layout))
        d_rest = jax.lax.psum(d_rest, ("pp", "cp"))
        d_chunks = jax.lax.psum(d_chunks, "cp") if layout.context > 1 else d_chunks
        grads = jax.tree.map(lambda g: g[None], (d_rest, to_blocks(d_chunks, layout)))
        return jax.lax.psum(sums, AXES), grads

    out = P(), (P("dp"), P("dp", "pp"))
    return _shard_map(island, layout, micros, out)(rest, blocks, micros)


def pipelined_sums(parts: Parts, rest: Tree, blocks: Tree, micros: Tree, layout: Layout) -> Tree:
    """Sums over the batch alone, of `pipelined_grads`."""

    def island(rest: Tree, blocks: Tree, micros: Tree) -> Any:
        pipeline = Pipeline(parts, layout, micros, remat="none")
        return jax.lax.psum(pipeline.loss(rest, to_chunks(blocks, layout))[1], AXES)

    return _shard_map(island, layout, micros, P())(rest, blocks, micros)


def _shard_map(island: Callable[..., Any], layout: Layout, micros: Tree, out: Any) -> Any:
    own = jax.tree.map(lambda x: P(*(None, "dp", "cp")[: x.ndim]), micros)
    return jax.shard_map(
        island, mesh=layout.mesh, in_specs=(P(), P("pp"), own), out_specs=out,
        axis_names=set(AXES), check_vma=False,
    )  # fmt: skip
