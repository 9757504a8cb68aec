"""The image autoencoder of Stable Diffusion (arXiv 2112.10752, section 3.1).

The reference is diffusers' AutoencoderKL.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from core_jax.models.autoencoder_kl.config import AutoencoderKLConfig
from core_jax.nn.layers import Conv2d, GroupNorm, Linear
from core_jax.nn.resnet import Downsample, ResnetBlock, Upsample
from core_jax.nn.stack import remat_layer
from core_jax.ops.attention import dot_product_attention
from core_jax.ops.execution import Execution
from core_jax.sharding import keep_rows

_SAME = ((1, 1), (1, 1))
_EPS = 1e-6
_LOGVAR_RANGE = (-30.0, 20.0)


class _Attention(nn.Module):
    """Self-attention of pixels with one head, and the residual connection."""

    config: AutoencoderKLConfig
    execution: Execution

    @nn.compact
    def __call__(self, x):
        B, h, w, D = x.shape
        y = GroupNorm(self.config.norm_num_groups, _EPS, name="group_norm")(x)
        y = y.reshape(B, h * w, D)
        q, k, v = (
            keep_rows(Linear(D, name=name)(y))[:, :, None, :] for name in ("to_q", "to_k", "to_v")
        )
        y = dot_product_attention(q, k, v, backend=self.execution.attention)[:, :, 0]
        return x + keep_rows(Linear(D, name="to_out_0")(y)).reshape(B, h, w, D)


def _resnet(config, execution, features, i):
    block = remat_layer(ResnetBlock, execution.remat)
    return block(
        features, config.norm_num_groups, _EPS, conv=execution.conv, name=f"resnets_{i}"
    )


class _Mid(nn.Module):
    config: AutoencoderKLConfig
    execution: Execution

    @nn.compact
    def __call__(self, x):
        c, execution = self.config, self.execution
        x = _resnet(c, execution, x.shape[-1], 0)(x, None)
        if c.mid_block_add_attention:
            attention = remat_layer(_Attention, execution.remat)
            x = attention(c, execution, name="attentions_0")(x)
        return _resnet(c, execution, x.shape[-1], 1)(x, None)


class _DownBlock(nn.Module):
    config: AutoencoderKLConfig
    execution: Execution
    level: int

    @nn.compact
    def __call__(self, x):
        c = self.config
        for i in range(c.layers_per_block):
            x = _resnet(c, self.execution, c.block_out_channels[self.level], i)(x, None)
        if self.level < len(c.block_out_channels) - 1:
            x = Downsample(0, self.execution.conv, name="downsamplers_0")(x)
        return x


class _UpBlock(nn.Module):
    config: AutoencoderKLConfig
    execution: Execution
    level: int

    @nn.compact
    def __call__(self, x):
        c = self.config
        for i in range(c.layers_per_block + 1):
            x = _resnet(c, self.execution, c.block_out_channels[self.level], i)(x, None)
        if self.level > 0:
            x = Upsample(self.execution.conv, name="upsamplers_0")(x)
        return x


class _Encoder(nn.Module):
    config: AutoencoderKLConfig
    execution: Execution

    @nn.compact
    def __call__(self, x):
        c, conv = self.config, self.execution.conv
        x = Conv2d(c.block_out_channels[0], 3, padding=_SAME, backend=conv, name="conv_in")(x)
        x = keep_rows(x)
        for level in range(len(c.block_out_channels)):
            x = _DownBlock(c, self.execution, level, name=f"down_blocks_{level}")(x)
        x = _Mid(c, self.execution, name="mid_block")(x)
        x = jax.nn.silu(GroupNorm(c.norm_num_groups, _EPS, name="conv_norm_out")(x))
        return Conv2d(2 * c.latent_channels, 3, padding=_SAME, backend=conv, name="conv_out")(x)


class _Decoder(nn.Module):
    config: AutoencoderKLConfig
    execution: Execution

    @nn.compact
    def __call__(self, x):
        c, conv = self.config, self.execution.conv
        x = Conv2d(c.block_out_channels[-1], 3, padding=_SAME, backend=conv, name="conv_in")(x)
        x = keep_rows(x)
        x = _Mid(c, self.execution, name="mid_block")(x)
        last = len(c.block_out_channels) - 1
        for i in range(last + 1):
            x = _UpBlock(c, self.execution, last - i, name=f"up_blocks_{i}")(x)
        x = jax.nn.silu(GroupNorm(c.norm_num_groups, _EPS, name="conv_norm_out")(x))
        return Conv2d(c.out_channels, 3, padding=_SAME, backend=conv, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """Images to latents and back; `f` below is `config.downsampling`.

    The latents of `encode` and `decode` are the network's own; a denoiser works on those of
    `scale_latents`.
    """

    config: AutoencoderKLConfig
    execution: Execution = Execution()

    def setup(self):
        """Declares the two networks."""
        c = self.config
        self.encoder = _Encoder(c, self.execution)
        self.decoder = _Decoder(c, self.execution)
        if c.use_quant_conv:
            self.quant_conv = Conv2d(2 * c.latent_channels, 1)
        if c.use_post_quant_conv:
            self.post_quant_conv = Conv2d(c.latent_channels, 1)

    def __call__(self, images: Float[Array, "B H W c"]) -> Float[Array, "B H W o"]:
        """Images after encoding (the mean, without noise) and decoding."""
        mean, _ = self.encode(images)
        return self.decode(mean)

    def encode(
        self, images: Float[Array, "B H W c"]
    ) -> tuple[Float[Array, "B h w l"], Float[Array, "B h w l"]]:
        """The Gaussian posterior of the latents.

        Args:
          images: in [-1, 1].

        Returns:
          (mean, log variance), h = H / f; the log variance is clipped to [-30, 20].

        Raises:
          ValueError: height or width is no multiple of f, or the channels do not fit.
        """
        c = self.config
        _, height, width, channels = images.shape
        if height % c.downsampling or width % c.downsampling:
            raise ValueError(
                f"images of {height}x{width}: height and width must be multiples of "
                f"{c.downsampling}; resize or crop them"
            )
        if channels != c.in_channels:
            raise ValueError(f"images have {channels} channels, the encoder takes {c.in_channels}")
        moments = self.encoder(images)
        if c.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *_LOGVAR_RANGE)

    def decode(self, latents: Float[Array, "B h w l"]) -> Float[Array, "B H W o"]:
        """Images of latents, nominally in [-1, 1] (not clipped).

        Raises:
          ValueError: the channels do not fit.
        """
        c = self.config
        if latents.shape[-1] != c.latent_channels:
            raise ValueError(
                f"latents have {latents.shape[-1]} channels, the decoder takes {c.latent_channels}"
            )
        if c.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


def sample_latents(
    mean: Float[Array, "B h w l"], logvar: Float[Array, "B h w l"], key: Key[Array, ""]
) -> Float[Array, "B h w l"]:
    """A draw from the posterior that `AutoencoderKL.encode` returns, in its type.

    Args:
      mean: of the Gaussian.
      logvar: its log variance.
      key: of `jax.random.key`.
    """
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    # float32: a bfloat16 standard deviation loses what little noise there is.
    draw = mean.astype(jnp.float32) + jnp.exp(0.5 * logvar.astype(jnp.float32)) * noise
    return draw.astype(mean.dtype)


def scale_latents(
    latents: Float[Array, "B h w l"], config: AutoencoderKLConfig
) -> Float[Array, "B h w l"]:
    """The autoencoder's latents -> the denoiser's, of about unit variance."""
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def unscale_latents(
    latents: Float[Array, "B h w l"], config: AutoencoderKLConfig
) -> Float[Array, "B h w l"]:
    """The denoiser's latents -> those that `AutoencoderKL.decode` takes."""
    return latents / config.scaling_factor + (config.shift_factor or 0.0)
