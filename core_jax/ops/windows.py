"""Attention of DaViT (arXiv 2204.03645): over windows of an image, and over channels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def split_windows(x: Float[Array, "B h w c"], size: int) -> Float[Array, "M P c"]:
    """Cuts images into windows of `size` x `size`; M = B * windows, P = size * size.

    Where a side is not a multiple of `size`, zeros are added at the right and the bottom.
    """
    B, h, w, c = x.shape
    rows, cols = -(-h // size), -(-w // size)
    x = jnp.pad(x, ((0, 0), (0, rows * size - h), (0, cols * size - w), (0, 0)))
    x = x.reshape(B, rows, size, cols, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B * rows * cols, size * size, c)


def join_windows(
    windows: Float[Array, "M P c"], size: int, height: int, width: int
) -> Float[Array, "B h w c"]:
    """The inverse of `split_windows`; the added zeros' places are cut off."""
    rows, cols = -(-height // size), -(-width // size)
    x = windows.reshape(-1, rows, cols, size, size, windows.shape[-1])
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * size, cols * size, windows.shape[-1])
    return x[:, :height, :width]


def channel_attention(
    q: Float[Array, "B P N H"],
    k: Float[Array, "B P N H"],
    v: Float[Array, "B P N H"],
) -> Float[Array, "B P N H"]:
    """Each channel of a group attends to the group's channels; all P positions are its features.

    The logits are scaled by P ** -0.5, the square root of the features summed over, and not by
    the width of a head. Logits and softmax are float32.
    """
    # The sum over positions can be long, so the scale goes first; it costs little.
    q = q * jnp.asarray(q.shape[1] ** -0.5, q.dtype)
    logits = jnp.einsum("BPNH,BPNJ->BNHJ", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("BNHJ,BPNJ->BPNH", weights, v)
