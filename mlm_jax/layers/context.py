"""Context parallelism: attention over sequences that are split over the devices of cp.

A device holds two parts of each sequence, an early and a late one (`Layout.order`), and their keys
and values visit the others. At home a device computes three half blocks: early queries on early
keys and late on late, each half of a square, and late on early. Of every visitor exactly two: late
queries see all of its early keys; and where it comes from before, early queries see its early keys
too, otherwise late queries its late ones. So all devices do the same work, 2 cp + 1 half blocks,
and nothing that causality masks (zigzag: Llama 3, section 3.3.2; ring: Liu et al. 2023). Where
attention is not causal, every device computes all four of every visitor.

ring        k and v go round by cp - 1 permutations; backward they go round again, and their
            gradients by as many more. A device holds two parts of them at a time, however many.
all_gather  k and v are gathered, and their gradients scattered: fewer, larger messages, and memory
            for the whole of both.

Results of half blocks are put together by their log-sum-exp, in float32 or wider. Backward is
written out: it computes the scores again, so that only q, k, v, the result and its log-sum-exp are
kept. Everything is an island of `shard_map` over cp, unless one is around it already.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from mlm_jax.layers.blockwise import (
    MOST_BLOCKS,
    Blocks,
    Formula,
    Sight,
    attended,
    blocks,
    gradients,
    grouped,
    lowest,
    mean_of,
    ungrouped,
)
from mlm_jax.layers.weight import wide
from mlm_jax.layout import Layout


def context_attention(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, formula: Formula, layout: Layout, *,
    segments_BT: jax.Array | None = None, window: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """What `blockwise_attention` computes of arrays whose sequences are in `layout.order`.

    Inside of a shard_map over cp they are a device's own part.
    """
    q_BKGTH = grouped(q_BTNH, k_BKSH.shape[1])
    return ungrouped(_attend(formula, layout, q_BKGTH, k_BKSH, v_BKSH, segments_BT, window))


QUERIES, KEYS = P(None, None, None, "cp"), P(None, None, "cp")  # of [B, K, G, T], and [B, K, T]
OPERANDS = (QUERIES, KEYS, KEYS, P(None, "cp"), P())  # q, k, v; segments and window, where given


class Visitor(NamedTuple):
    """The keys of a device, its two halves apart: k, v [2, B, K, h, H], segments [2, B, h]."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None


class HalfBlock(NamedTuple):
    """Queries of one half on keys of one: 0 is the early, 1 the late, or an int32 [] says which."""

    query: int | jax.Array
    key: int | jax.Array
    diagonal: bool


def half_blocks(me: Any, visitor: Any, *, at_home: bool, causal: bool) -> list[HalfBlock]:
    """What device `me` computes with keys from device `visitor`, or with its own."""
    # First those in which every query sees itself: from then on all sums are finite.
    if not causal:
        return [HalfBlock(i, j, False) for i, j in ((0, 0), (1, 1), (1, 0), (0, 1))]
    if at_home:
        return [HalfBlock(0, 0, True), HalfBlock(1, 1, True), HalfBlock(1, 0, False)]
    same = jnp.where(visitor < me, 0, 1)
    return [HalfBlock(1, 0, False), HalfBlock(same, same, False)]


State = Any  # what a device adds up as keys visit it
Work = Callable[..., tuple[State, Any]]  # (keys, their device, state, *, at_home) -> state, found


class Device:
    """One device's part of the work, from inside of the island.

    q [B, K, G, T, H], k and v [B, K, T, H]; segments [B, T] or None; window int32 [] or None.
    """

    def __init__(
        self, formula: Formula, layout: Layout, q: jax.Array, k: jax.Array, v: jax.Array,
        segments: jax.Array | None, window: jax.Array | None,
    ):  # fmt: skip
        self.formula, self.n, self.window = formula, layout.context, window
        self.me = jax.lax.axis_index("cp")
        self.q, self.segments = halves(q, 3), halves(segments, 1)
        self.own = Visitor(halves(k, 2), halves(v, 2), self.segments)
        self.exchange = EXCHANGES[layout.cp_attention]

    def parts(
        self, visitor: Visitor, there: jax.Array, *, at_home: bool
    ) -> Iterator[tuple[HalfBlock, Sight, Blocks]]:
        """The half blocks of the keys of device `there`."""
        h = self.q.shape[4]
        for half in half_blocks(self.me, there, at_home=at_home, causal=self.formula.causal):
            sight = Sight(
                self.places(self.me, half.query), self.places(there, half.key),
                at(self.segments, half.query), at(visitor.segments, half.key), self.window,
            )  # fmt: skip
            # As many blocks in all however many devices: their scores shrink with the rest.
            most, window = max(1, MOST_BLOCKS // self.n), self.formula.window
            yield half, sight, blocks(h, h, diagonal=half.diagonal, window=window, most=most)

    def places(self, device: jax.Array, half: int | jax.Array) -> jax.Array:
        """int32 [h] places in their row of the tokens in a half of a device."""
        h = self.q.shape[4]
        part = jnp.where(half == 0, device, 2 * self.n - 1 - device)
        return part * h + jnp.arange(h)

    def forward(self) -> tuple[jax.Array, jax.Array]:
        """Result [B, K, G, T, H] in q's dtype, and log-sum-exp [B, K, G, T]."""

        def work(visitor: Visitor, there: jax.Array, state: State, *, at_home: bool = False) -> Any:
            for half, sight, cut in self.parts(visitor, there, at_home=at_home):
                of = at(self.q, half.query), at(visitor.k, half.key), at(visitor.v, half.key)
                both = merged(at(state, half.query), attended(self.formula, sight, cut, *of))
                state = put(state, half.query, both)
            return state, ()

        dtype = wide(self.q.dtype)
        zeros = jnp.zeros(self.q.shape, dtype), jnp.full(self.q.shape[:-1], lowest(dtype), dtype)
        (out, lse), _ = self.exchange(self.n, self.own, work, zeros)
        return whole(out.astype(self.q.dtype), 3), whole(lse, 3)

    def backward(self, out: jax.Array, lse: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        """Gradients by q, k and v."""
        of_queries = tuple(halves(x, 3) for x in (lse, mean_of(out, g), g))

        def work(visitor: Visitor, there: jax.Array, dq: State, *, at_home: bool = False) -> Any:
            found = tuple(jnp.zeros(x.shape, lse.dtype) for x in visitor[:2])
            for half, sight, cut in self.parts(visitor, there, at_home=at_home):
                of = at(self.q, half.query), at(visitor.k, half.key), at(visitor.v, half.key)
                more = at(of_queries, half.query)
                d, *kv, _ = gradients(self.formula, sight, cut, *of, *more)
                dq = put(dq, half.query, at(dq, half.query) + d)
                found = put(found, half.key, optax.tree.add(at(found, half.key), tuple(kv)))
            return dq, found

        zeros = jnp.zeros(self.q.shape, lse.dtype)
        dq, (dk, dv) = self.exchange(self.n, self.own, work, zeros)
        return tuple(whole(x.astype(g.dtype), i) for x, i in ((dq, 3), (dk, 2), (dv, 2)))


def merged(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Attention over the keys of two parts, each (softmax(scores) v, log-sum-exp of scores)."""
    lse = jnp.logaddexp(a[1], b[1])
    out_a, out_b = (jnp.exp(part - lse)[..., None] * out for out, part in (a, b))
    return out_a + out_b, lse


def ring(n: int, own: Visitor, work: Work, state: State) -> tuple[State, Any]:
    """The state after all keys have visited, and what they found on their way, brought home.

    Keys are sent on while they are worked with; what they find follows them a step behind. In a
    loop, since XLA would send them all at once, and keep them.
    """
    me, next_one = jax.lax.axis_index("cp"), [(i, (i + 1) % n) for i in range(n)]

    def sent(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.ppermute(x, "cp", next_one), tree)

    def step(carry: Any, number: jax.Array | int) -> Any:
        visitor, state, away = carry
        following = sent(visitor)
        state, found = work(visitor, (me - number) % n, state)
        return (following, state, optax.tree.add(sent(away), found)), None

    visitor = sent(own)
    state, at_home = work(own, me, state, at_home=True)
    if n == 2:
        state, away = work(visitor, (me - 1) % n, state)
        return state, optax.tree.add(at_home, sent(away))
    following = sent(visitor)
    state, away = work(visitor, (me - 1) % n, state)
    carry = following, state, away
    visitor, state, away = jax.lax.scan(step, carry, jnp.arange(2, n - 1))[0]
    state, found = work(visitor, (me - (n - 1)) % n, state)
    return state, optax.tree.add(at_home, sent(optax.tree.add(sent(away), found)))


def gathered(n: int, own: Visitor, work: Work, state: State) -> tuple[State, Any]:
    """The same with all keys on all devices."""
    me = jax.lax.axis_index("cp")
    every = jax.tree.map(lambda x: jax.lax.all_gather(x, "cp"), own)

    def step(carry: Any, number: jax.Array) -> Any:
        state, total = carry
        there = (me - number) % n
        state, found = work(at(every, there), there, state)
        return (state, put(total, there, found)), None

    state, at_home = work(own, me, state, at_home=True)
    total = jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), at_home)
    carry = state, put(total, me, at_home)
    state, total = jax.lax.scan(step, carry, jnp.arange(1, n))[0]
    return state, jax.tree.map(lambda x: jax.lax.psum_scatter(x, "cp"), total)


EXCHANGES = {"ring": ring, "all_gather": gathered}


def halves(x: Any, dim: int) -> Any:
    """[2, ...] of an array whose sequence is at this dim; None of None."""
    split = lambda x: x.reshape(*x.shape[:dim], 2, -1, *x.shape[dim + 1 :])  # noqa: E731
    return jax.tree.map(lambda x: jnp.moveaxis(split(x), dim, 0), x)


def whole(x: jax.Array, dim: int) -> jax.Array:
    """The inverse of `halves`."""
    x = jnp.moveaxis(x, 0, dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def at(tree: Any, i: int | jax.Array) -> Any:
    """x[i] of arrays, without a gather."""
    index = lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)  # noqa: E731
    return jax.tree.map(index, tree)


def put(tree: Any, i: int | jax.Array, new: Any) -> Any:
    """Arrays with x[i] replaced."""
    return jax.tree.map(lambda x, n: jax.lax.dynamic_update_index_in_dim(x, n, i, 0), tree, new)


def _forward(formula: Formula, layout: Layout, *of: Any) -> Any:
    def island(*of: Any) -> Any:
        return Device(formula, layout, *of).forward()

    out, lse = _over_cp(island, layout, OPERANDS, (QUERIES, QUERIES))(*of)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (of, out, lse)


def _backward(formula: Formula, layout: Layout, saved: tuple, g: jax.Array) -> Any:
    def island(of: Any, *results: jax.Array) -> Any:
        return Device(formula, layout, *of).backward(*results)

    split = OPERANDS, QUERIES, QUERIES, QUERIES
    return *_over_cp(island, layout, split, OPERANDS[:3])(*saved, g), None, None


_attend = jax.custom_vjp(
    lambda formula, layout, *of: _forward(formula, layout, *of)[0], nondiff_argnums=(0, 1)
)
_attend.defvjp(_forward, _backward)


def _over_cp(f: Callable[..., Any], layout: Layout, own: Any, out: Any) -> Callable[..., Any]:
    if "cp" in layout.manual:
        return f
    return jax.shard_map(
        f, mesh=layout.mesh, in_specs=own, out_specs=out, axis_names={"cp"}, check_vma=False
    )
