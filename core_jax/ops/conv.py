"""Two-dimensional convolution, NHWC with HWIO kernels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from core_jax.ops.execution import ConvBackend, DepthwiseBackend

Padding = tuple[tuple[int, int], tuple[int, int]]


def conv2d(
    x: Float[Array, "B h w i"],
    kernel: Float[Array, "kh kw j o"],
    *,
    stride: int = 1,
    padding: Padding = ((0, 0), (0, 0)),
    groups: int = 1,
    backend: ConvBackend | DepthwiseBackend = "xla",
) -> Float[Array, "B h2 w2 o"]:
    """Convolution (correlation, as in PyTorch).

    Args:
      x: images.
      kernel: [kh, kw, in / groups, out].
      stride: the same along both axes.
      padding: zeros ((top, bottom), (left, right)).
      groups: feature groups; equal to the channels for a depthwise convolution.
      backend: see `Execution.conv` and, for depthwise convolutions, `Execution.depthwise_conv`;
        one that does not cover the grouping falls back to the compiler's.
    """
    if backend == "shifts" and groups == x.shape[-1] == kernel.shape[-1]:
        taps = _taps(x, kernel.shape[:2], stride, padding)
        return sum(  # pyright: ignore[reportReturnType] - there is at least one tap
            tap * kernel[i // kernel.shape[1], i % kernel.shape[1], 0][None, None, None]
            for i, tap in enumerate(taps)
        )
    if backend == "im2col" and groups == 1:
        taps = _taps(x, kernel.shape[:2], stride, padding)
        columns = jnp.concatenate(taps, axis=-1) if len(taps) > 1 else taps[0]
        return columns @ kernel.reshape(-1, kernel.shape[-1])
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _taps(x, window, stride, padding):
    """One strided view of the padded image for each kernel position, row by row."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    kh, kw = window
    rows = (x.shape[1] - kh) // stride + 1
    cols = (x.shape[2] - kw) // stride + 1
    return [
        x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (cols - 1) * stride + 1 : stride]
        for i in range(kh)
        for j in range(kw)
    ]


def upsample_nearest(x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c"]:
    """Repeats every pixel twice along both axes."""
    B, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (B, h, 2, w, 2, c))
    return x.reshape(B, 2 * h, 2 * w, c)
