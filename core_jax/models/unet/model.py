"""The conditional denoising U-Net of Stable Diffusion 1 and 2 (arXiv 2112.10752).

The reference is diffusers' UNet2DConditionModel.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core_jax.models.unet.config import UNet2DConditionConfig
from core_jax.nn.layers import Conv2d, GroupNorm, LayerNorm, Linear, gelu
from core_jax.nn.resnet import Downsample, ResnetBlock, Upsample
from core_jax.nn.stack import remat_layer
from core_jax.ops.attention import dot_product_attention
from core_jax.ops.execution import Execution
from core_jax.ops.timesteps import timestep_embedding
from core_jax.sharding import keep_rows

_SAME = ((1, 1), (1, 1))
_TRANSFORMER_GROUP_NORM_EPS = 1e-6
_LAYER_NORM_EPS = 1e-5


class _TimestepMlp(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        h = jax.nn.silu(Linear(self.features, name="linear_1")(x))
        return keep_rows(Linear(self.features, name="linear_2")(keep_rows(h)))


class _Attention(nn.Module):
    num_heads: int
    execution: Execution

    @nn.compact
    def __call__(self, x, context):
        """x: [B, T, D]; keys and values come from context [B, S, D']."""
        B, T, D = x.shape
        q, k, v = (
            keep_rows(Linear(D, use_bias=False, name=name)(of)).reshape(
                B, of.shape[1], self.num_heads, -1
            )
            for name, of in (("to_q", x), ("to_k", context), ("to_v", context))
        )
        out = dot_product_attention(q, k, v, backend=self.execution.attention)
        return keep_rows(Linear(D, name="to_out_0")(out.reshape(B, T, D)))


class _GatedGelu(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        h = keep_rows(Linear(2 * self.features, name="proj")(x))
        value, gate = jnp.split(h, 2, axis=-1)
        return value * gelu(gate)


class _FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        D = x.shape[-1]
        return keep_rows(Linear(D, name="net_2")(_GatedGelu(4 * D, name="net_0")(x)))


class _TransformerBlock(nn.Module):
    num_heads: int
    only_cross_attention: bool
    execution: Execution

    @nn.compact
    def __call__(self, x, context):
        attention = (self.num_heads, self.execution)
        h = LayerNorm(_LAYER_NORM_EPS, name="norm1")(x)
        x = x + _Attention(*attention, name="attn1")(h, context if self.only_cross_attention else h)
        h = LayerNorm(_LAYER_NORM_EPS, name="norm2")(x)
        x = x + _Attention(*attention, name="attn2")(h, context)
        h = LayerNorm(_LAYER_NORM_EPS, name="norm3")(x)
        return x + _FeedForward(name="ff")(h)


class _Transformer(nn.Module):
    """Attention over the pixels of an image and its context."""

    config: UNet2DConditionConfig
    execution: Execution
    level: int
    only_cross_attention: bool = False

    @nn.compact
    def __call__(self, x, context):
        c = self.config
        B, h, w, D = x.shape
        y = GroupNorm(c.norm_num_groups, _TRANSFORMER_GROUP_NORM_EPS, name="norm")(x)
        y = self._projection("proj_in", y)
        y = y.reshape(B, h * w, D)
        for i in range(c.per_block("transformer_layers_per_block")[self.level]):
            y = _TransformerBlock(
                c.per_block("attention_head_dim")[self.level],
                self.only_cross_attention,
                self.execution,
                name=f"transformer_blocks_{i}",
            )(y, context)
        return x + self._projection("proj_out", y.reshape(B, h, w, D))

    def _projection(self, name, x):
        if self.config.use_linear_projection:
            return keep_rows(Linear(x.shape[-1], name=name)(x))
        return keep_rows(Conv2d(x.shape[-1], 1, backend=self.execution.conv, name=name)(x))


class _Block(nn.Module):
    """What the three kinds of blocks share."""

    config: UNet2DConditionConfig
    execution: Execution
    level: int

    def resnet(self, i, output_scale_factor=1.0):
        c = self.config
        return remat_layer(ResnetBlock, self.execution.remat)(
            c.block_out_channels[self.level],
            c.norm_num_groups,
            c.norm_eps,
            c.resnet_time_scale_shift,
            output_scale_factor,
            self.execution.conv,
            name=f"resnets_{i}",
        )

    def transformer(self, i, only_cross_attention):
        return remat_layer(_Transformer, self.execution.remat)(
            self.config, self.execution, self.level, only_cross_attention, name=f"attentions_{i}"
        )


class _DownBlock(_Block):
    @nn.compact
    def __call__(self, x, time, context):
        """Returns the result and every state that the way up will be given."""
        c, level = self.config, self.level
        states = []
        for i in range(c.per_block("layers_per_block")[level]):
            x = self.resnet(i)(x, time)
            if c.down_block_types[level] == "CrossAttnDownBlock2D":
                x = self.transformer(i, c.per_block("only_cross_attention")[level])(x, context)
            states.append(x)
        if level < c.num_levels - 1:
            x = Downsample(c.downsample_padding, self.execution.conv, name="downsamplers_0")(x)
            states.append(x)
        return x, states


class _MidBlock(_Block):
    @nn.compact
    def __call__(self, x, time, context):
        scale = self.config.mid_block_scale_factor
        x = self.resnet(0, scale)(x, time)
        if self.config.mid_block_type == "UNetMidBlock2DCrossAttn":
            x = self.transformer(0, False)(x, context)
            x = self.resnet(1, scale)(x, time)
        return x


class _UpBlock(_Block):
    @nn.compact
    def __call__(self, x, states, time, context):
        """Consumes states of the way down from the end of the list."""
        c, level = self.config, self.level
        block_type = c.up_block_types[c.num_levels - 1 - level]
        for i in range(c.per_block("layers_per_block")[level] + 1):
            x = jnp.concatenate([x, states.pop()], axis=-1)
            x = self.resnet(i)(x, time)
            if block_type == "CrossAttnUpBlock2D":
                x = self.transformer(i, c.per_block("only_cross_attention")[level])(x, context)
        if level > 0:
            x = Upsample(self.execution.conv, name="upsamplers_0")(x)
        return x


class UNet2DConditionModel(nn.Module):
    """Predicts the noise (or v) in latents, given the time and a context.

    With `execution.remat` each residual block and each transformer is recomputed by itself.
    """

    config: UNet2DConditionConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "B h w c"],
        timesteps: Int[Array, " B"] | Float[Array, " B"],
        context: Float[Array, "B S D"],
    ) -> Float[Array, "B h w o"]:
        """The model's prediction, in the type of the parameters.

        Args:
          sample: noisy latents, scaled by the autoencoder's factor.
          timesteps: positions in the noise schedule (0 to 999); may be fractional.
          context: what to condition on, usually a text encoder's last hidden state.

        Raises:
          ValueError: shapes do not fit the configuration.
        """
        c, execution = self.config, self.execution
        self._check(sample, context)
        time = timestep_embedding(
            timesteps,
            c.block_out_channels[0],
            flip_sin_to_cos=c.flip_sin_to_cos,
            freq_shift=c.freq_shift,
        )
        width = c.time_embedding_dim or 4 * c.block_out_channels[0]
        time = _TimestepMlp(width, name="time_embedding")(time)

        x = keep_rows(self._conv3(c.block_out_channels[0], "conv_in")(sample))
        states = [x]
        for level in range(c.num_levels):
            block = _DownBlock(c, execution, level, name=f"down_blocks_{level}")
            x, new_states = block(x, time, context)
            states += new_states
        last = c.num_levels - 1
        if c.mid_block_type is not None:
            x = _MidBlock(c, execution, last, name="mid_block")(x, time, context)
        for i in range(c.num_levels):
            block = _UpBlock(c, execution, last - i, name=f"up_blocks_{i}")
            count = c.per_block("layers_per_block")[last - i] + 1
            x = block(x, states[-count:], time, context)
            states = states[:-count]
        x = jax.nn.silu(GroupNorm(c.norm_num_groups, c.norm_eps, name="conv_norm_out")(x))
        return self._conv3(c.out_channels, "conv_out")(x)

    def _conv3(self, features, name):
        return Conv2d(features, 3, padding=_SAME, backend=self.execution.conv, name=name)

    def _check(self, sample, context):
        c = self.config
        _, h, w, channels = sample.shape
        if h % c.downsampling or w % c.downsampling:
            raise ValueError(
                f"latents of {h}x{w}: height and width must be multiples of {c.downsampling} "
                f"({c.num_levels} resolutions); resize or crop the image"
            )
        if channels != c.in_channels:
            raise ValueError(f"latents have {channels} channels, the U-Net takes {c.in_channels}")
        wanted = c.per_block("cross_attention_dim")[0]
        if context.shape[-1] != wanted:
            raise ValueError(
                f"the context has {context.shape[-1]} features, the U-Net takes {wanted} "
                "(cross_attention_dim)"
            )
