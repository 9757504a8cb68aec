"""Rotary position embeddings (arXiv 2104.09864), half-split form as Qwen2 and Llama use it."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rope_angles(
    positions: Int[Array, "B T"], *, head_dim: int, theta: float, factor: float = 1.0
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """Cosines and sines for every position, float32 whatever the model computes in.

    bfloat16 tables would move far positions by whole tokens. With `factor`, tokens count as that
    much closer to one another (position interpolation, arXiv 2306.15595; "linear" on the hub).
    """
    inv_freq = _inverse_frequencies(head_dim, theta) / factor
    return _tables(positions[:, :, None].astype(jnp.float32) * inv_freq[None, None, :])


def mrope_angles(
    positions: Int[Array, "3 B T"], *, head_dim: int, theta: float, sections: Sequence[int]
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """Cosines and sines where a token has three positions (M-RoPE, arXiv 2409.12191).

    Where the three agree, as in text, the tables are those of `rope_angles` to the bit.

    Args:
      positions: time, row and column of every token.
      head_dim: H.
      theta: base of the angles.
      sections: how many of the H/2 frequencies, from the fastest on, turn by time, by row and by
        column.

    Raises:
      ValueError: the sections are not three numbers that sum to H/2.
    """
    if len(sections) != 3 or sum(sections) * 2 != head_dim:
        raise ValueError(f"M-RoPE sections {tuple(sections)} do not sum to head_dim {head_dim} / 2")
    axis = np.repeat(np.arange(3), sections)  # which position turns each frequency
    turned = jnp.moveaxis(positions[axis], 0, -1).astype(jnp.float32)
    return _tables(turned * _inverse_frequencies(head_dim, theta)[None, None, :])


def axial_rope_angles(
    positions: Int[Array, "B T 2"], *, head_dim: int, theta: float
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """Cosines and sines for places in an image: row and column turn half of the pairs each.

    Both halves have the same frequencies, those of a head of size H/2 (the vision tower of
    Qwen2-VL, arXiv 2409.12191).
    """
    inv_freq = _inverse_frequencies(head_dim // 2, theta)
    angles = positions[..., None].astype(jnp.float32) * inv_freq[None, None, None, :]
    return _tables(angles.reshape(*positions.shape[:2], head_dim // 2))


def _inverse_frequencies(head_dim: int, theta: float) -> Float[Array, " F"]:
    return 1.0 / (theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))


def _tables(angles: Float[Array, "B T F"]) -> tuple[Array, Array]:
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H"], sin: Float[Array, "B T H"]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2) of each head."""
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    out = x.astype(jnp.float32) * cos[:, :, None] + rotated.astype(jnp.float32) * sin[:, :, None]
    return out.astype(x.dtype)
