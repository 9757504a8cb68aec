"""CLIP's text transformer (arXiv 2103.00020), as Stable Diffusion conditions on it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core_jax.models.clip_text.config import CLIPTextConfig
from core_jax.nn.layers import Embed, LayerNorm, Linear, gelu
from core_jax.nn.stack import scan_layers
from core_jax.ops.attention import causal_mask, dot_product_attention
from core_jax.ops.execution import Execution
from core_jax.sharding import keep_rows


class _Attention(nn.Module):
    config: CLIPTextConfig
    execution: Execution

    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        B, T, D = x.shape
        q, k, v = (
            keep_rows(Linear(D, name=name)(x)).reshape(B, T, c.num_attention_heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = dot_product_attention(q, k, v, mask=mask, backend=self.execution.attention)
        return keep_rows(Linear(D, name="out_proj")(out.reshape(B, T, D)))


class _Mlp(nn.Module):
    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x):
        h = keep_rows(Linear(self.config.intermediate_size, name="fc1")(x))
        h = gelu(h) if self.config.hidden_act == "gelu" else h * jax.nn.sigmoid(1.702 * h)
        return keep_rows(Linear(x.shape[-1], name="fc2")(h))


class _Layer(nn.Module):
    config: CLIPTextConfig
    execution: Execution

    @nn.compact
    def __call__(self, x, _, mask):
        eps = self.config.layer_norm_eps
        h = LayerNorm(eps, name="layer_norm1")(x)
        x = x + _Attention(self.config, self.execution, name="self_attn")(h, mask)
        h = LayerNorm(eps, name="layer_norm2")(x)
        return x + _Mlp(self.config, name="mlp")(h), None


class CLIPTextModel(nn.Module):
    """Text to context embeddings.

    `__call__` starts from token ids; `from_embeddings` starts after the token table, which is
    what VLV's T(z) is (arXiv 2507.07104, section 3.2): positions are still added, the mask is
    still causal, and every slot is taken.
    """

    config: CLIPTextConfig
    execution: Execution = Execution()

    def setup(self):
        """The tables, the layers and the final normalisation."""
        c = self.config
        self.token_embedding = Embed(c.vocab_size, c.hidden_size)
        self.position_embedding = Embed(c.max_position_embeddings, c.hidden_size)
        layers = scan_layers(
            _Layer, length=c.num_hidden_layers, num_broadcast=1, execution=self.execution
        )
        self.layers = layers(c, self.execution)
        self.final_layer_norm = LayerNorm(c.layer_norm_eps)

    def __call__(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The last hidden state, after the final normalisation."""
        return self.from_embeddings(self.token_embedding(input_ids))

    def from_embeddings(self, embeds: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The same from token embeddings.

        Raises:
          ValueError: more tokens than positions.
        """
        T = embeds.shape[1]
        if self.config.max_position_embeddings < T:
            raise ValueError(
                f"{T} tokens, but the text encoder has {self.config.max_position_embeddings} "
                "positions; use fewer queries or truncate"
            )
        positions = self.position_embedding(jnp.arange(T))[None]
        x = embeds.astype(positions.dtype) + positions
        x, _ = self.layers(keep_rows(x), None, causal_mask(T))
        return self.final_layer_norm(x)
