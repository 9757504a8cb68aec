"""Convolutional residual blocks and resampling, shared by the denoiser and the image autoencoder.

Names and maths are those of diffusers' ResnetBlock2D, Downsample2D and Upsample2D.
"""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from core_jax.nn.layers import Conv2d, GroupNorm, Linear
from core_jax.ops.conv import upsample_nearest
from core_jax.ops.execution import ConvBackend
from core_jax.sharding import keep_rows

_SAME = ((1, 1), (1, 1))


class ResnetBlock(nn.Module):
    """norm, SiLU, 3x3 convolution; time; norm, SiLU, 3x3 convolution; plus the input.

    Attributes:
      features: output channels; where they differ from the input's, a 1x1 convolution maps it.
      num_groups, eps: of both normalisations.
      time_scale_shift: "default" adds the projected time embedding before the second
        normalisation; "scale_shift" scales and shifts after it.
      output_scale_factor: the result is divided by it.
    """

    features: int
    num_groups: int
    eps: float
    time_scale_shift: str = "default"
    output_scale_factor: int | float = 1.0
    conv: ConvBackend = "xla"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w i"], time: Float[Array, "B D"] | None
    ) -> Float[Array, "B h w o"]:
        """Transforms images; `time` is the time embedding, or None for a block without one."""
        h = jax.nn.silu(GroupNorm(self.num_groups, self.eps, name="norm1")(x))
        h = keep_rows(self._conv3("conv1")(h))
        scale = shift = None
        if time is not None:
            wide = self.time_scale_shift == "scale_shift"
            t = Linear(self.features * (2 if wide else 1), name="time_emb_proj")(jax.nn.silu(time))
            t = t[:, None, None, :]
            if wide:
                scale, shift = t[..., : self.features], t[..., self.features :]
            else:
                h = h + t
        h = GroupNorm(self.num_groups, self.eps, name="norm2")(h)
        if scale is not None and shift is not None:
            h = h * (1 + scale) + shift
        h = keep_rows(self._conv3("conv2")(jax.nn.silu(h)))
        if x.shape[-1] != self.features:
            x = keep_rows(Conv2d(self.features, 1, backend=self.conv, name="conv_shortcut")(x))
        return (x.astype(h.dtype) + h) / self.output_scale_factor

    def _conv3(self, name: str) -> Conv2d:
        return Conv2d(self.features, 3, padding=_SAME, backend=self.conv, name=name)


class Downsample(nn.Module):
    """Halves the resolution by a strided 3x3 convolution.

    Attributes:
      padding: 1 pads every side; 0 pads right and bottom by one pixel (the image autoencoder).
    """

    padding: int = 1
    conv: ConvBackend = "xla"

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c"]:
        """Downsamples images."""
        p = self.padding
        padding = ((p, p), (p, p)) if p else ((0, 1), (0, 1))
        conv = Conv2d(x.shape[-1], 3, stride=2, padding=padding, backend=self.conv, name="conv")
        return keep_rows(conv(x))


class Upsample(nn.Module):
    """Doubles the resolution by repetition, then a 3x3 convolution."""

    conv: ConvBackend = "xla"

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c"]:
        """Upsamples images."""
        x = upsample_nearest(x)
        return keep_rows(Conv2d(x.shape[-1], 3, padding=_SAME, backend=self.conv, name="conv")(x))
