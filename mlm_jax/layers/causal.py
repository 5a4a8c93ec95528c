"""Causal attention in plain XLA that never looks above the diagonal and never keeps the scores."""

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


class Operands(NamedTuple):
    """q [B, K, G, T, H], k and v [B, K, S, H]. What is seen: at most what causality allows.

    mask bool [B, 1, T, S], or None. window int32 [], where it depends on the layer, or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: jax.Array | None
    window: jax.Array | None


def causal_attention(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_B1TS: jax.Array | None,
    formula: Formula, window: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """softmax(scale q k^T) v, [B, T, N, H], over the keys that a query sees.

    These are: with S == T, itself and what comes before in its row, within the window; with S != T
    what the mask says, which is needed then. N / K query heads share a key/value head.

    Queries go in blocks, each against the keys that one of them may see; backward computes the
    scores again (Dao 2023, algorithm 2, without tiles of keys). Scores and softmax are in float32,
    or wider.
    """
    B, T, _, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, k_BKSH.shape[1], -1, H)
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    out_BKGTH = _attend(formula, Operands(q_BKGTH, k_BKSH, v_BKSH, mask_B1TS, window))
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _forward(formula: Formula, of: Operands) -> Any:
    outs, lses = [], []
    for rows, keys in _blocks(of, formula.window):
        s, seen = _scores(formula, of, rows, keys)
        s = jnp.where(seen, s, jnp.finfo(s.dtype).min / 2)
        top = s.max(-1)
        p = jnp.exp(s - top[..., None])
        total = p.sum(-1)
        out = _dot("BKGTS,BKSH->BKGTH", p.astype(of.v.dtype), of.v[:, :, keys])
        outs.append((out / total[..., None]).astype(of.v.dtype))
        lses.append(top + jnp.log(total))
    out, lse = jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (of, out, lse)


def _backward(formula: Formula, saved: tuple[Operands, jax.Array, jax.Array], g: jax.Array) -> Any:
    of, out, lse = saved
    mean = jnp.sum(out.astype(lse.dtype) * g.astype(lse.dtype), axis=-1)  # of dp, by p
    dqs, dk, dv = [], *(jnp.zeros(x.shape, lse.dtype) for x in (of.k, of.v))
    for rows, keys in _blocks(of, formula.window):
        s, seen = _scores(formula, of, rows, keys)
        p = jnp.where(seen, jnp.exp(s - lse[..., rows, None]), 0)
        dp = _dot("BKGTH,BKSH->BKGTS", g[..., rows, :], of.v[:, :, keys])
        ds = p * (dp - mean[..., rows, None])
        if formula.softcap:
            ds *= 1 - jnp.square(s / formula.softcap)
        ds, p = (x.astype(g.dtype) for x in (ds, p))
        dqs.append(_dot("BKGTS,BKSH->BKGTH", ds, of.k[:, :, keys]))
        dk = _add(dk, keys, _dot("BKGTS,BKGTH->BKSH", ds, of.q[..., rows, :]))
        dv = _add(dv, keys, _dot("BKGTS,BKGTH->BKSH", p, g[..., rows, :]))
    dq = jnp.concatenate(dqs, axis=3) * formula.scale
    dq, dk, dv = (x.astype(g.dtype) for x in (dq, dk * formula.scale, dv))
    return (Operands(dq, dk, dv, None, None),)


_attend = jax.custom_vjp(lambda formula, of: _forward(formula, of)[0], nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)


def _blocks(of: Operands, window: int | None) -> list[tuple[slice, slice]]:
    """Rows of queries, and the keys that one of them may see."""
    T, S = of.q.shape[3], of.k.shape[2]
    size = max(BLOCK, -(-T // MOST_BLOCKS))
    rows = [slice(start, min(start + size, T)) for start in range(0, T, size)]
    if S != T:
        return [(block, slice(0, S)) for block in rows]
    return [(block, slice(max(0, block.start + 1 - (window or T)), block.stop)) for block in rows]


def _scores(
    formula: Formula, of: Operands, rows: slice, keys: slice
) -> tuple[jax.Array, jax.Array]:
    """Scores [B, K, G, rows, keys], and which of them are seen."""
    s = _dot("BKGTH,BKSH->BKGTS", of.q[..., rows, :], of.k[:, :, keys]) * formula.scale
    if formula.softcap:
        s = formula.softcap * jnp.tanh(s / formula.softcap)
    seen = jnp.array(True) if of.mask is None else of.mask[:, :, None, rows, keys]
    if of.q.shape[3] == of.k.shape[2]:
        back = jnp.arange(rows.start, rows.stop)[:, None] - jnp.arange(keys.start, keys.stop)
        seen &= back >= 0
        for window in (formula.window, of.window):
            if window is not None:
                seen &= back < window
    return s, seen


def _add(total_BKSH: jax.Array, keys: slice, part: jax.Array) -> jax.Array:
    """total.at[:, :, keys].add(part), which is a scatter; under a shard_map over some axes XLA
    gathers a scatter's operands from the devices of all others."""
    part += total_BKSH[:, :, keys]
    return jax.lax.dynamic_update_slice_in_dim(total_BKSH, part, keys.start, axis=2)


def _dot(dims: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(dims, a, b, preferred_element_type=wide(a.dtype))
