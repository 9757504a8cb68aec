"""The DaViT tower of Florence-2 (arXiv 2204.03645) and the head that makes tokens of its grid."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from core_jax.models.florence2.config import Florence2VisionConfig
from core_jax.nn.layers import Conv2d, Embed, LayerNorm, Linear, gelu
from core_jax.nn.stack import scan_layers
from core_jax.ops.attention import dot_product_attention
from core_jax.ops.execution import Execution
from core_jax.ops.windows import channel_attention, join_windows, split_windows
from core_jax.sharding import keep_rows

_EPS = 1e-5


class _PatchEmbed(nn.Module):
    """The strided convolution at the start of a stage."""

    config: Florence2VisionConfig
    execution: Execution
    stage: int

    @nn.compact
    def __call__(self, x):
        c, i = self.config, self.stage
        pad = (c.patch_padding[i], c.patch_padding[i])
        norm = LayerNorm(_EPS, name="norm")
        conv = Conv2d(
            c.embed_dim[i],
            c.patch_size[i],
            stride=c.patch_stride[i],
            padding=(pad, pad),
            backend=self.execution.conv,
            name="conv",
        )
        return keep_rows(conv(norm(x)) if c.patch_prenorm[i] else norm(conv(x)))


class _WindowAttention(nn.Module):
    config: Florence2VisionConfig
    execution: Execution
    stage: int

    @nn.compact
    def __call__(self, x):
        c = self.config
        h, w, D = x.shape[1:]
        # The zeros that fill the last windows are projected and attended to like any position:
        # the released weights were trained that way.
        windows = keep_rows(split_windows(x, c.window_size))
        M, P, _ = windows.shape
        qkv = keep_rows(Linear(3 * D, use_bias=c.qkv_bias, name="qkv")(windows))
        q, k, v = jnp.moveaxis(qkv.reshape(M, P, 3, c.num_heads[self.stage], -1), 2, 0)
        out = dot_product_attention(q, k, v, backend=self.execution.attention).reshape(M, P, D)
        return join_windows(keep_rows(Linear(D, name="proj")(out)), c.window_size, h, w)


class _ChannelAttention(nn.Module):
    config: Florence2VisionConfig
    execution: Execution
    stage: int

    @nn.compact
    def __call__(self, x):
        c = self.config
        B, h, w, D = x.shape
        qkv = keep_rows(Linear(3 * D, use_bias=c.qkv_bias, name="qkv")(x))
        qkv = qkv.reshape(B, h * w, 3, c.num_groups[self.stage], -1)
        out = channel_attention(*jnp.moveaxis(qkv, 2, 0))
        return Linear(D, name="proj")(out.reshape(B, h, w, D))


class _Mlp(nn.Module):
    config: Florence2VisionConfig

    @nn.compact
    def __call__(self, x):
        D = x.shape[-1]
        h = gelu(keep_rows(Linear(int(D * self.config.mlp_ratio), name="fc1")(x)))
        return Linear(D, name="fc2")(h)


class _HalfBlock(nn.Module):
    """Attention (over windows or over channels) and an MLP, each after a depthwise convolution."""

    config: Florence2VisionConfig
    execution: Execution
    stage: int
    attention: str

    @nn.compact
    def __call__(self, x):
        def convolve(x, name):
            D = x.shape[-1]
            conv = Conv2d(
                D,
                3,
                padding=((1, 1), (1, 1)),
                groups=D,
                backend=self.execution.depthwise_conv,
                name=name,
            )
            return keep_rows(x + conv(x))

        kind = {"window_attn": _WindowAttention, "channel_attn": _ChannelAttention}[self.attention]
        attention = kind(self.config, self.execution, self.stage, name=self.attention)
        x = convolve(x, "conv1")
        x = keep_rows(x + attention(LayerNorm(_EPS, name="norm1")(x)))
        x = convolve(x, "conv2")
        return keep_rows(x + _Mlp(self.config, name="ffn")(LayerNorm(_EPS, name="norm2")(x)))


class _Block(nn.Module):
    config: Florence2VisionConfig
    execution: Execution
    stage: int

    @nn.compact
    def __call__(self, x, _):
        arguments = (self.config, self.execution, self.stage)
        x = _HalfBlock(*arguments, "window_attn", name="spatial_block")(x)
        return _HalfBlock(*arguments, "channel_attn", name="channel_block")(x), None


class DaViT(nn.Module):
    """Images to a grid of features. Stochastic depth is left out: the tower is deterministic."""

    config: Florence2VisionConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        """The last stage's features; h and w are a 32nd of the image's sides."""
        c, x = self.config, pixel_values
        for i, depth in enumerate(c.depths):
            x = _PatchEmbed(c, self.execution, i, name=f"convs_{i}")(x)
            blocks = scan_layers(_Block, length=depth, execution=self.execution)
            x, _ = blocks(c, self.execution, i, name=f"blocks_{i}")(x, None)
        return x


class _PositionEmbed(nn.Module):
    """Learned positions: the first half of the channels is the column's, the rest the row's."""

    config: Florence2VisionConfig

    @nn.compact
    def __call__(self, height, width):
        limit, D = self.config.max_position_embeddings, self.config.embed_dim[-1]
        if max(height, width) > limit:
            raise ValueError(
                f"the image gives a {height} x {width} grid, but the model has {limit} positions "
                "a side; use a smaller image"
            )
        rows = Embed(limit, D // 2, name="row_embeddings")(jnp.arange(height))
        columns = Embed(limit, D // 2, name="column_embeddings")(jnp.arange(width))
        columns = jnp.broadcast_to(columns[None], (height, width, columns.shape[-1]))
        rows = jnp.broadcast_to(rows[:, None], (height, width, rows.shape[-1]))
        return jnp.concatenate([columns, rows], axis=-1)


class Projector(nn.Module):
    """A grid of features to image tokens in the language model's width."""

    config: Florence2VisionConfig

    @nn.compact
    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B P D"]:
        """Mean token first, then the h * w positions row by row: P = 1 + h * w.

        Raises:
          ValueError: the grid is larger than the position tables.
        """
        B, h, w, c = features.shape
        position = _PositionEmbed(self.config, name="image_position_embed")(h, w)
        # The frame embedding of an image is row 0 of a table of sines and cosines: 0, 1, 0, 1...
        frame = (jnp.arange(c) % 2).astype(position.dtype)
        x = features.astype(position.dtype) + position[None]
        x = (x + frame[None, None, None]).reshape(B, h * w, c)
        mean = jnp.mean(x.astype(jnp.float32), axis=1, keepdims=True).astype(x.dtype)
        x = jnp.concatenate([mean, x], axis=1)
        x = Linear(self.config.projection_dim, use_bias=False, name="image_projection")(x)
        return LayerNorm(_EPS, name="image_proj_norm")(keep_rows(x))
