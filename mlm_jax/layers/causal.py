"""Causal attention in plain XLA that never looks above the diagonal and never keeps the scores."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 64  # queries; on a CPU as fast as 128, and it skips more of what is masked


class Residuals(NamedTuple):
    """What backward needs: the operands, and the output with its log-sum-exp."""

    q_BKGTH: jax.Array
    k_BKSH: jax.Array
    v_BKSH: jax.Array
    mask_B1TS: jax.Array | None
    out_BKGTH: jax.Array
    lse_BKGT: jax.Array


def causal_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_B1TS: jax.Array | None
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, [B, T, N, H], where mask is True: nowhere after the query itself.

    N / K query heads share a key/value head. mask None: everything before, and itself. Queries go
    in blocks, each against the keys up to its end; backward computes the scores again (Dao 2023,
    algorithm 2, without tiles of keys). Scores and softmax are in float32, or wider.
    """
    B, T, _, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, k_BSKH.shape[2], -1, H)
    q_BKGTH, k_BKSH = q_BTKGH.transpose(0, 2, 3, 1, 4), k_BSKH.swapaxes(1, 2)
    out_BKGTH = _attend(q_BKGTH, k_BKSH, v_BSKH.swapaxes(1, 2), mask_B1TS)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


@jax.custom_vjp
def _attend(q, k, v, mask):
    return _forward(q, k, v, mask)[0]


def _forward(q, k, v, mask):
    outs, lses = [], []
    for rows, keys in _blocks(q.shape[3], k.shape[2]):
        s = _scores(q, k, mask, rows, keys)
        top = s.max(-1)
        p = jnp.exp(s - top[..., None])
        total = p.sum(-1)
        out = _dot("BKGTS,BKSH->BKGTH", p.astype(v.dtype), v[:, :, keys])
        outs.append((out / total[..., None]).astype(v.dtype))
        lses.append(top + jnp.log(total))
    out, lse = jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, Residuals(q, k, v, mask, out, lse)


def _backward(saved: Residuals, g):
    q, k, v, mask, out, lse = saved
    wide = lse.dtype
    dot = jnp.sum(out.astype(wide) * g.astype(wide), axis=-1)
    dqs, dk, dv = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    for rows, keys in _blocks(q.shape[3], k.shape[2]):
        p = jnp.exp(_scores(q, k, mask, rows, keys) - lse[..., rows, None])
        dp = _dot("BKGTH,BKSH->BKGTS", g[..., rows, :], v[:, :, keys])
        ds = (p * (dp - dot[..., rows, None])).astype(q.dtype)
        dqs.append(_dot("BKGTS,BKSH->BKGTH", ds, k[:, :, keys]))
        dk = dk.at[:, :, keys].add(_dot("BKGTS,BKGTH->BKSH", ds, q[..., rows, :]))
        dv = dv.at[:, :, keys].add(_dot("BKGTS,BKGTH->BKSH", p.astype(g.dtype), g[..., rows, :]))
    scale = 1 / math.sqrt(q.shape[-1])
    dq = jnp.concatenate(dqs, axis=3) * scale
    return dq.astype(q.dtype), (dk * scale).astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _blocks(T: int, S: int) -> list[tuple[slice, slice]]:
    """Rows of queries, and the keys they may look at: with a cache (S > T), all of them."""
    ends = [min(start + BLOCK, T) for start in range(0, T, BLOCK)]
    return [
        (slice(start, end), slice(0, end if S == T else S))
        for start, end in zip(range(0, T, BLOCK), ends, strict=True)
    ]


def _scores(q, k, mask, rows, keys):
    s = _dot("BKGTH,BKSH->BKGTS", q[..., rows, :], k[:, :, keys]) / math.sqrt(q.shape[-1])
    if mask is None:
        seen = jnp.arange(keys.stop) <= jnp.arange(rows.start, rows.stop)[:, None]
    else:
        seen = mask[:, :, None, rows, keys]
    return jnp.where(seen, s, jnp.finfo(s.dtype).min / 2)


def _dot(dims: str, a: jax.Array, b: jax.Array) -> jax.Array:
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(dims, a, b, preferred_element_type=wide)
