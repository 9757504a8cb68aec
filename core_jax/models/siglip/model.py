"""SigLIP's vision tower (arXiv 2303.15343): a plain ViT without a class token."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from core_jax.models.siglip.config import SiglipVisionConfig
from core_jax.nn.layers import Conv2d, Embed, LayerNorm, Linear, gelu_tanh
from core_jax.nn.stack import scan_layers
from core_jax.ops.attention import dot_product_attention
from core_jax.ops.execution import Execution
from core_jax.sharding import constrain


class _Attention(nn.Module):
    config: SiglipVisionConfig
    execution: Execution

    @nn.compact
    def __call__(self, x):
        B, T, D = x.shape
        q, k, v = (
            Linear(D, name=name)(x).reshape(B, T, self.config.num_attention_heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q = constrain(q, "batch", "seq", "act_heads", None)
        out = dot_product_attention(q, k, v, backend=self.execution.attention)
        return Linear(D, name="out_proj")(out.reshape(B, T, D))


class _Mlp(nn.Module):
    config: SiglipVisionConfig

    @nn.compact
    def __call__(self, x):
        h = gelu_tanh(Linear(self.config.intermediate_size, name="fc1")(x))
        h = constrain(h, "batch", "seq", "act_mlp")
        return Linear(x.shape[-1], name="fc2")(h)


class _Layer(nn.Module):
    config: SiglipVisionConfig
    execution: Execution

    @nn.compact
    def __call__(self, x, _):
        eps = self.config.layer_norm_eps
        h = LayerNorm(eps, name="layer_norm1")(x)
        x = x + _Attention(self.config, self.execution, name="self_attn")(h)
        h = LayerNorm(eps, name="layer_norm2")(x)
        x = x + _Mlp(self.config, name="mlp")(h)
        return constrain(x, "batch", "seq", "act_embed"), None


class SiglipVisionModel(nn.Module):
    """Images to patch features; the pooling head of contrastive training is left out."""

    config: SiglipVisionConfig
    execution: Execution = Execution()

    def setup(self):
        """Patches, positions, layers and the final normalisation."""
        c = self.config
        self.patch_embedding = Conv2d(
            c.hidden_size, c.patch_size, stride=c.patch_size, backend=self.execution.conv
        )
        self.position_embedding = Embed(c.patches_per_side**2, c.hidden_size)
        layers = scan_layers(_Layer, length=c.num_hidden_layers, execution=self.execution)
        self.layers = layers(c, self.execution)
        self.post_layernorm = LayerNorm(c.layer_norm_eps)

    def __call__(self, pixel_values: Float[Array, "B height width c"]) -> Float[Array, "B h w D"]:
        """The last hidden state, normalised, as the grid of patches that it is.

        Args:
          pixel_values: normalised images of `image_size` x `image_size`.

        Raises:
          ValueError: images of another size.
        """
        c = self.config
        B, height, width, _ = pixel_values.shape
        if (height, width) != (c.image_size, c.image_size):
            raise ValueError(
                f"images of {height} x {width} pixels, but the SigLIP tower takes "
                f"{c.image_size} x {c.image_size}; resize them with its image processor"
            )
        side = c.patches_per_side
        x = self.patch_embedding(pixel_values).reshape(B, side * side, c.hidden_size)
        x = x + self.position_embedding(jnp.arange(side * side))[None]
        x, _ = self.layers(constrain(x, "batch", "seq", "act_embed"), None)
        return self.post_layernorm(x).reshape(B, side, side, c.hidden_size)
