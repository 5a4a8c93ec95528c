"""Relative positions: what is added to a score by how far a key is from its query (T5)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.layers.weight import Normal, weight, wide


def distances(cfg: ModelConfig) -> nnx.Param:
    """A number for each bucket and head, [buckets, N], shared by all layers of a stack."""
    return weight(cfg, Normal(cfg.init_std), bucket=cfg.relative_buckets, heads=cfg.n_heads)


def buckets(distance: np.ndarray, cfg: ModelConfig, *, bidirectional: bool) -> np.ndarray:
    """int32 buckets of distances, place of the key less place of the query.

    Half of the buckets have a distance each; the others are logarithmic, up to relative_distance,
    from which on all distances are one. bidirectional: keys behind the query have a half of their
    own, else they are one with distance 0. (Raffel et al. 2020, section 2.1; in float32, as in
    transformers' T5Attention._relative_position_bucket, whose edges depend on it.)
    """
    n, first = cfg.relative_buckets, 0
    if bidirectional:
        n //= 2
        first, far = n * (distance > 0), abs(distance)
    else:
        far = np.maximum(-distance, 0)
    exact = n // 2
    logarithm = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
    scale = np.float32(np.log(cfg.relative_distance / exact))
    coarse = exact + (logarithm / scale * np.float32(n - exact)).astype(np.int32)
    return (first + np.where(far < exact, far, np.minimum(coarse, n - 1))).astype(np.int32)


def relative_bias(
    table_bN: jax.Array, cfg: ModelConfig, T: int, S: int, *, bidirectional: bool
) -> jax.Array:
    """[1, N, T, S] to be added to the scores of T queries and S keys, both from place 0 on.

    In float32 or wider. Its gradient is sums over diagonals, without a scatter.
    """
    behind, before = np.arange(S), np.arange(1 - T, 0)
    by_place = np.concatenate([behind, [0], before])  # [S + T]: distance d is at d mod (S + T)
    by_place_NP = _looked_up(table_bN, cfg, by_place, bidirectional)
    rows = jnp.tile(by_place_NP, T)[:, : T * (S + T - 1)]  # each begins one place earlier
    return rows.reshape(1, -1, T, S + T - 1)[..., :S]


def cached_bias(
    table_bN: jax.Array, cfg: ModelConfig, positions_BT: jax.Array, S: int
) -> jax.Array:
    """[B, N, T, S]: of a decoder's queries at these positions, and keys in a cache of S places."""
    by_distance_NP = _looked_up(table_bN, cfg, np.arange(1 - S, S), bidirectional=False)
    distance_BTS = jnp.arange(S) - positions_BT[..., None]
    return by_distance_NP[:, distance_BTS + S - 1].swapaxes(0, 1)


def _looked_up(
    table_bN: jax.Array, cfg: ModelConfig, distance: np.ndarray, bidirectional: bool
) -> jax.Array:
    """The table at the buckets of these distances, [N, P]."""
    hit_Pb = buckets(distance, cfg, bidirectional=bidirectional)[:, None] == np.arange(
        cfg.relative_buckets
    )
    hit_Pb = jnp.asarray(hit_Pb, wide(table_bN.dtype))
    return jnp.einsum("Pb,bN->NP", hit_Pb, table_bN, precision="highest")
