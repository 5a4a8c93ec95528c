"""Attention in plain XLA that never keeps the scores and, causal, never looks above the diagonal.

A part of it, some queries against some keys, is what `attended` and `gradients` compute; parts of
the same queries are put together by their log-sum-exp (layers.context does so across devices).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mlm_jax.layers.weight import wide

BLOCK = 64  # queries; on a CPU as fast as 128, and it skips more of what is masked
MOST_BLOCKS = 16  # of a sequence: they are unrolled


class Formula(NamedTuple):
    """What is computed of queries and keys, the same in every layer."""

    scale: float  # of q k^T
    softcap: float = 0.0  # c tanh(s / c) of scores s, for c above 0 (Gemma team 2024)
    window: int | None = None  # tokens a query looks back on, itself included; None: all
    causal: bool = True  # whether it looks back only


class Sight(NamedTuple):
    """Which keys a query sees: those of its segment and, where attention is causal, at its own
    place in the row and before it, within the window.

    queries int32 [T], or [B, T] where rows differ, and keys int32 [S]: their places. Segments int32
    [B, T] and [B, S], or None: all one. window int32 [], where it depends on the layer, or None.
    """

    queries: jax.Array
    keys: jax.Array
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    window: jax.Array | None = None

    def of(self, rows: slice, keys: slice, formula: Formula) -> jax.Array:
        """bool [1 or B, 1, 1, rows, keys]."""
        back = self.queries[..., rows, None] - self.keys[keys]
        seen = back >= 0 if formula.causal else jnp.ones_like(back, bool)
        for most in (formula.window, self.window):
            if most is not None:
                seen &= back < most
        if self.query_segments is not None and self.key_segments is not None:
            here, there = self.query_segments[:, rows], self.key_segments[:, keys]
            seen &= here[:, :, None] == there[:, None, :]
        return seen.reshape(-1, 1, 1, *seen.shape[-2:])


Blocks = list[tuple[slice, slice]]  # queries, and the keys that one of them may see


def blockwise_attention(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, formula: Formula, *,
    segments_BT: jax.Array | None = None, key_segments_BS: jax.Array | None = None,
    positions_BT: jax.Array | None = None, window: jax.Array | None = None,
    bias_BKGTS: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """softmax(scale q k^T + bias) v, [B, T, N, H], over the keys that a query sees.

    These are of the same segment and, where attention is causal, itself and what comes before it in
    its row, within the window. key_segments: where keys are of other tokens than queries.
    positions: places of queries where keys are a cache of all places, [0, S). N / K query heads
    share a key/value head. bias: its first dim may be 1, for all rows.

    Queries go in blocks, each against the keys that one of them may see; backward computes the
    scores again (Dao 2023, algorithm 2, without tiles of keys). Scores and softmax are in float32,
    or wider.
    """
    q_BKGTH = grouped(q_BTNH, k_BKSH.shape[1])
    key_segments_BS = segments_BT if key_segments_BS is None else key_segments_BS
    more = segments_BT, key_segments_BS, positions_BT, window
    return ungrouped(_attend(formula, q_BKGTH, k_BKSH, v_BKSH, bias_BKGTS, *more))


def grouped(q_BTNH: jax.Array, n_kv_heads: int) -> jax.Array:
    """q [B, K, G, T, H]: query heads by the key/value head that they share."""
    B, T, _, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, n_kv_heads, -1, H).transpose(0, 2, 3, 1, 4)


def ungrouped(out_BKGTH: jax.Array) -> jax.Array:
    B, K, G, T, H = out_BKGTH.shape
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def blocks(T: int, S: int, *, diagonal: bool, window: int | None, most: int) -> Blocks:
    """T queries in at most so many blocks, each with those of S keys that one of them may see.

    diagonal: keys are the queries' own tokens, so that what is above it is skipped; else none is.
    """
    size = max(BLOCK, -(-T // most))
    rows = [slice(start, min(start + size, T)) for start in range(0, T, size)]
    if not diagonal:
        return [(block, slice(0, S)) for block in rows]
    return [(block, slice(max(0, block.start + 1 - (window or T)), block.stop)) for block in rows]


def attended(
    formula: Formula, sight: Sight, parts: Blocks, q: jax.Array, k: jax.Array, v: jax.Array,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Of q [B, K, G, T, H], k and v [B, K, S, H]: softmax(scores) v, and their log-sum-exp.

    The latter [B, K, G, T], both in float32 or wider. Of a query that sees no key it is so low that
    the other parts of the query decide alone.
    """
    outs, lses = [], []
    for rows, keys in parts:
        s = _scores(formula, q[..., rows, :], k[:, :, keys])
        s = s if bias is None else s + bias[..., rows, keys]
        s = jnp.where(sight.of(rows, keys, formula), s, lowest(s.dtype))
        top = s.max(-1)
        p = jnp.exp(s - top[..., None])
        total = p.sum(-1)
        out = _dot("BKGTS,BKSH->BKGTH", p.astype(v.dtype), v[:, :, keys])
        outs.append(out / total[..., None])
        lses.append(top + jnp.log(total))
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def gradients(
    formula: Formula, sight: Sight, parts: Blocks, q: jax.Array, k: jax.Array, v: jax.Array,
    lse: jax.Array, mean: jax.Array, g: jax.Array, bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:  # fmt: skip
    """Gradients by q, k, v and bias, in float32 or wider, of a part whose result has gradient g.

    lse [B, K, G, T]: of the whole row. mean: sum of result and g over the last dim.
    """
    dqs, dk, dv = [], *(jnp.zeros(x.shape, lse.dtype) for x in (k, v))
    dbias = None if bias is None else jnp.zeros(bias.shape, lse.dtype)
    for rows, keys in parts:
        s = _scores(formula, q[..., rows, :], k[:, :, keys])
        biased = s if bias is None else s + bias[..., rows, keys]
        seen = sight.of(rows, keys, formula)
        p = jnp.where(seen, jnp.exp(biased - lse[..., rows, None]), 0)
        dp = _dot("BKGTH,BKSH->BKGTS", g[..., rows, :], v[:, :, keys])
        ds = p * (dp - mean[..., rows, None])
        if dbias is not None:
            of_all = ds if len(dbias) > 1 else ds.sum(0, keepdims=True)
            at = (0, 0, 0, rows.start, keys.start)
            dbias = jax.lax.dynamic_update_slice(dbias, of_all, at)
        if formula.softcap:
            ds *= 1 - jnp.square(s / formula.softcap)
        ds, p = (x.astype(g.dtype) for x in (ds, p))
        dqs.append(_dot("BKGTS,BKSH->BKGTH", ds, k[:, :, keys]))
        dk = _add(dk, keys, _dot("BKGTS,BKGTH->BKSH", ds, q[..., rows, :]))
        dv = _add(dv, keys, _dot("BKGTS,BKGTH->BKSH", p, g[..., rows, :]))
    return jnp.concatenate(dqs, axis=3) * formula.scale, dk * formula.scale, dv, dbias


def _add(total_BKSH: jax.Array, keys: slice, part: jax.Array) -> jax.Array:
    """total.at[:, :, keys].add(part), which is a scatter; under a shard_map over some axes XLA
    gathers a scatter's operands from the devices of all others."""
    part += total_BKSH[:, :, keys]
    return jax.lax.dynamic_update_slice_in_dim(total_BKSH, part, keys.start, axis=2)


def mean_of(out: jax.Array, g: jax.Array) -> jax.Array:
    """The `mean` of `gradients`: of dp, by p."""
    return jnp.sum(out.astype(wide(g.dtype)) * g.astype(wide(g.dtype)), axis=-1)


def lowest(dtype: jnp.dtype) -> float:
    """A score so low that it counts for nothing beside any other, and that may be added to."""
    return float(jnp.finfo(dtype).min) / 2


def _forward(formula: Formula, *of: Any) -> Any:
    q, k, v, bias, *more = of
    out, lse = attended(formula, *_whole(formula, q, k, *more), q, k, v, bias)
    out, lse = checkpoint_name(out.astype(v.dtype), "attention"), checkpoint_name(lse, "attention")
    return out, (of, out, lse)


def _backward(formula: Formula, saved: tuple, g: jax.Array) -> Any:
    (q, k, v, bias, *more), out, lse = saved
    sight, parts = _whole(formula, q, k, *more)
    *found, dbias = gradients(formula, sight, parts, q, k, v, lse, mean_of(out, g), g, bias)
    dbias = None if bias is None or dbias is None else dbias.astype(bias.dtype)
    return *(x.astype(g.dtype) for x in found), dbias, None, None, None, None


_attend = jax.custom_vjp(lambda formula, *of: _forward(formula, *of)[0], nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)


def _whole(
    formula: Formula, q: jax.Array, k: jax.Array, segments: jax.Array | None,
    key_segments: jax.Array | None, positions: jax.Array | None, window: jax.Array | None,
) -> tuple[Sight, Blocks]:  # fmt: skip
    """What queries of a whole row, or of some positions, see of all keys; and their blocks."""
    T, S = q.shape[3], k.shape[2]
    queries = jnp.arange(T) if positions is None else positions
    diagonal = positions is None and formula.causal
    sight = Sight(queries, jnp.arange(S), segments, key_segments, window)
    return sight, blocks(T, S, diagonal=diagonal, window=formula.window, most=MOST_BLOCKS)


def _scores(formula: Formula, q: jax.Array, k: jax.Array) -> jax.Array:
    """[B, K, G, T, S]."""
    s = _dot("BKGTH,BKSH->BKGTS", q, k) * formula.scale
    return formula.softcap * jnp.tanh(s / formula.softcap) if formula.softcap else s


def _dot(dims: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(dims, a, b, preferred_element_type=wide(a.dtype))
