"""The vision tower of Qwen2.5-VL: attention in windows, and in a few blocks over a whole image.

Patches lie in whole windows from the start (see packing.py), so that window attention is a
reshape: S = windows * patches of a window. A slot of segment 0 is padding.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.models.qwen2_5_vl.config import Qwen2_5_VLVisionConfig
from core_jax.nn.layers import Linear, RMSNorm, gelu
from core_jax.nn.stack import scan_layers
from core_jax.ops.attention import dot_product_attention
from core_jax.ops.execution import Execution
from core_jax.ops.rope import apply_rope, axial_rope_angles
from core_jax.ops.splash import Segments
from core_jax.sharding import constrain

_EPS = 1e-6
_THETA = 10000.0


class _PatchEmbed(nn.Module):
    """A three-dimensional convolution whose stride is its size: one product a patch."""

    config: Qwen2_5_VLVisionConfig

    @nn.compact
    def __call__(self, patches):
        c = self.config
        shape = (c.hidden_size, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=(1, 2, 3, 4), out_axis=0
        )
        kernel = self.param("kernel", init, shape)  # in the stored order
        return patches.astype(kernel.dtype) @ kernel.reshape(c.hidden_size, -1).T


class _PatchEmbedding(nn.Module):
    config: Qwen2_5_VLVisionConfig

    @nn.compact
    def __call__(self, patches):
        return _PatchEmbed(self.config, name="proj")(patches)


class _Attention(nn.Module):
    config: Qwen2_5_VLVisionConfig
    execution: Execution

    @nn.compact
    def __call__(self, x, sees_all, shared):
        c = self.config
        rope, segments = shared
        R, S, D = x.shape
        qkv = Linear(3 * D, name="qkv")(x).reshape(R, S, 3, c.num_heads, c.head_dim)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)

        def whole(q, k, v):
            # Padding sees padding: no row is without a key, and nothing else sees it.
            mask = Segments(segments)
            return dot_product_attention(q, k, v, mask=mask, backend=self.execution.attention)

        def windowed(q, k, v):
            # A window is of one image, so within it only padding has to be hidden.
            q, k, v = (a.reshape(-1, c.window_patches, *a.shape[2:]) for a in (q, k, v))
            mask = (segments > 0).reshape(-1, 1, c.window_patches)
            out = dot_product_attention(q, k, v, mask=mask, backend=self.execution.attention)
            return out.reshape(R, S, c.num_heads, c.head_dim)

        out = jax.lax.cond(sees_all, whole, windowed, q, k, v)
        return Linear(D, name="proj")(out.reshape(R, S, D))


class _Mlp(nn.Module):
    config: Qwen2_5_VLVisionConfig

    @nn.compact
    def __call__(self, x):
        F = self.config.intermediate_size
        h = jax.nn.silu(Linear(F, name="gate_proj")(x)) * Linear(F, name="up_proj")(x)
        return Linear(x.shape[-1], name="down_proj")(constrain(h, "batch", "seq", "act_mlp"))


class _Block(nn.Module):
    config: Qwen2_5_VLVisionConfig
    execution: Execution

    @nn.compact
    def __call__(self, x, sees_all, shared):
        attention = _Attention(self.config, self.execution, name="attn")
        x = x + attention(RMSNorm(_EPS, name="norm1")(x), sees_all, shared)
        x = x + _Mlp(self.config, name="mlp")(RMSNorm(_EPS, name="norm2")(x))
        return constrain(x, "batch", "seq", "act_embed"), None


class PatchMerger(nn.Module):
    """Normalises patches and maps the `merge_unit` patches of a square to one image token.

    Attributes:
      features: width of an image token.
      merge_unit: patches of one token.
    """

    features: int
    merge_unit: int

    @nn.compact
    def __call__(self, states: Float[Array, "R S D"]) -> Float[Array, "R U F"]:
        """U = S / merge_unit tokens; a square's patches are neighbours."""
        R, S, D = states.shape
        h = RMSNorm(_EPS, name="ln_q")(states)
        h = h.reshape(R, S // self.merge_unit, D * self.merge_unit)
        h = gelu(Linear(h.shape[-1], name="mlp_0")(h))
        return Linear(self.features, name="mlp_2")(h)


class Qwen2_5_VLVision(nn.Module):
    """The tower. `states` is what a frozen tower gives; `merge` maps it into the text model."""

    config: Qwen2_5_VLVisionConfig
    execution: Execution = Execution()

    def setup(self):
        """Patch embedding, blocks, merger."""
        c = self.config
        self.patch_embed = _PatchEmbedding(c)
        blocks = scan_layers(
            _Block, length=c.depth, num_broadcast=1, execution=self.execution
        )
        self.blocks = blocks(c, self.execution)
        self.merger = PatchMerger(c.out_hidden_size, c.merge_unit)

    def __call__(
        self,
        patches: Float[Array, "R S C"],
        positions: Int[Array, "R S 2"],
        segments: Int[Array, "R S"],
    ) -> Float[Array, "R U D"]:
        """Image tokens, U = S / merge_unit of them a row, in the packed order."""
        return self.merge(self.states(patches, positions, segments))

    def states(
        self,
        patches: Float[Array, "R S C"],
        positions: Int[Array, "R S 2"],
        segments: Int[Array, "R S"],
    ) -> Float[Array, "R S D"]:
        """States of every patch after the last block, before the merger's normalisation.

        Args:
          patches: channels * frames * height * width of a patch, in the stored order.
          positions: row and column of each patch in its image.
          segments: which image (frame) of its row a patch belongs to, from 1; 0 at padding.

        Raises:
          ValueError: S is not a whole number of windows.
        """
        c = self.config
        if patches.shape[1] % c.window_patches:
            raise ValueError(
                f"{patches.shape[1]} patch slots are not whole windows of {c.window_patches}; "
                "pack images with pack_images"
            )
        x = constrain(self.patch_embed(patches), "batch", "seq", "act_embed")
        rope = axial_rope_angles(positions, head_dim=c.head_dim, theta=_THETA)
        sees_all = jnp.isin(jnp.arange(c.depth), jnp.asarray(c.fullatt_block_indexes, jnp.int32))
        return self.blocks(x, sees_all, (rope, segments))[0]

    def merge(self, states: Float[Array, "R S D"]) -> Float[Array, "R U F"]:
        """Image tokens of the text model's width."""
        return self.merger(states)


def valid_tokens(segments: Int[Array, "R S"], merge_unit: int) -> Bool[Array, "R U"]:
    """Which of the packed image tokens belong to an image."""
    return segments[:, ::merge_unit] > 0
