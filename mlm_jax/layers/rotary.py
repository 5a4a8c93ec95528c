"""Rotary position embedding (Su et al. 2021), the halves rotated as in Llama and Megatron-LM."""

import jax
import jax.numpy as jnp


def rotary_angles(positions_BT: jax.Array, head_dim: int, base: float, dtype: str) -> jax.Array:
    """Angles [B, T, H/2], radians: position / base^(2i/H)."""
    inverse = base ** -(jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    return positions_BT[..., None].astype(dtype) * inverse


def rotate(x_BTNH: jax.Array, angles_BTh: jax.Array) -> jax.Array:
    """Each pair (x_i, x_{i + H/2}) turned by its angle; in the angles' dtype, returned in x's."""
    cos, sin = (f(angles_BTh)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x_BTNH.astype(angles_BTh.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
