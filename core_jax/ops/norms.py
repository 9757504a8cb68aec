"""Normalisation layers; statistics are always computed in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from core_jax.ops.broadcast import match_rank


def layer_norm(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    *,
    eps: float,
) -> Float[Array, "... D"]:
    """Layer normalisation over the last axis (arXiv 1607.06450)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y * match_rank(scale, y).astype(jnp.float32) + match_rank(bias, y).astype(jnp.float32)
    return y.astype(x.dtype)


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], *, eps: float
) -> Float[Array, "... D"]:
    """Root-mean-square normalisation (arXiv 1910.07467).

    The normalised value is rounded to the type of `x` before it is scaled, as Qwen2 does.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return match_rank(scale, y).astype(x.dtype) * y.astype(x.dtype)


def rms_norm_one_plus(
    x: Float[Array, "... D"], scale: Float[Array, " D"], *, eps: float
) -> Float[Array, "... D"]:
    """Root-mean-square normalisation times 1 + scale, as Gemma does; rounded once, at the end."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (1.0 + match_rank(scale, y).astype(jnp.float32))).astype(x.dtype)


def group_norm(
    x: Float[Array, "B h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    *,
    num_groups: int,
    eps: float,
) -> Float[Array, "B h w c"]:
    """Group normalisation over space and the channels of a group (arXiv 1803.08494).

    Raises:
      ValueError: the channels do not divide into the groups.
    """
    B, h, w, c = x.shape
    if c % num_groups:
        raise ValueError(f"{c} channels do not divide into {num_groups} groups")
    y = x.astype(jnp.float32).reshape(B, h * w, num_groups, c // num_groups)
    # Two passes: a one-pass variance cancels badly for activations with a large mean.
    y = y - jnp.mean(y, axis=(1, 3), keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=(1, 3), keepdims=True) + eps)
    y = y.reshape(B, h, w, c)
    y = y * match_rank(scale, y).astype(jnp.float32) + match_rank(bias, y).astype(jnp.float32)
    return y.astype(x.dtype)
