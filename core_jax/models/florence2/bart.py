"""BART (arXiv 1910.13461): the encoder and the decoder of Florence-2."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.models.florence2.config import BartConfig
from core_jax.nn.layers import Embed, LayerNorm, Linear, gelu
from core_jax.nn.stack import scan_layers
from core_jax.ops.attention import cache_mask, causal_mask, dot_product_attention, padding_mask
from core_jax.ops.execution import Execution
from core_jax.sharding import keep_rows

_EPS = 1e-5
_LAYERED = ("k", "v", "cross_k", "cross_v")
# Rows 0 and 1 of the position tables are leftovers of fairseq's padding symbols.
POSITION_OFFSET = 2


@flax.struct.dataclass
class BartCache:
    """What the decoder remembers. L layers, S slots, N heads of width H, M encoder positions.

    Attributes:
      k: self-attention keys [L, B, S, N, H].
      v: self-attention values [L, B, S, N, H].
      cross_k: keys of the encoder's states [L, B, M, N, H].
      cross_v: values of the encoder's states [L, B, M, N, H].
      cross_valid: which encoder states are not padding [B, M].
      end: slots written so far, int32 []; the next token's slot and position.
    """

    # Not typed as arrays: the fields also hold shapes, shardings and whatever tree maps return.
    k: Any
    v: Any
    cross_k: Any
    cross_v: Any
    cross_valid: Any
    end: Any

    def repeat(self, times: int) -> "BartCache":
        """Every row `times` times, for beams."""
        layered = {n: jnp.repeat(getattr(self, n), times, axis=1) for n in _LAYERED}
        cross_valid = jnp.repeat(self.cross_valid, times, axis=0)
        return dataclasses.replace(self, **layered, cross_valid=cross_valid)

    def take_rows(self, rows: Int[Array, " B"]) -> "BartCache":
        """Rows that share one input change places; its encoder's keys are the same and stay."""
        k, v = (jnp.take(x, rows, axis=1) for x in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v)


class _Attention(nn.Module):
    """Multi-head attention, in parts so that keys and values can be kept."""

    width: int
    heads: int
    execution: Execution

    def setup(self):
        self.q_proj, self.k_proj = Linear(self.width), Linear(self.width)
        self.v_proj, self.out_proj = Linear(self.width), Linear(self.width)

    def keys_values(self, x):
        shape = (*x.shape[:2], self.heads, -1)
        k, v = (keep_rows(part(x)).reshape(shape) for part in (self.k_proj, self.v_proj))
        return k, v

    def __call__(self, x, k, v, mask):
        q = keep_rows(self.q_proj(x)).reshape(*x.shape[:2], self.heads, -1)
        out = dot_product_attention(q, k, v, mask=mask, backend=self.execution.attention)
        return keep_rows(self.out_proj(out.reshape(x.shape)))


class _EncoderLayer(nn.Module):
    config: BartConfig
    execution: Execution

    @nn.compact
    def __call__(self, x, _, mask):
        c = self.config
        attention = _Attention(
            c.d_model, c.encoder_attention_heads, self.execution, name="self_attn"
        )
        h = attention(x, *attention.keys_values(x), mask)
        x = LayerNorm(_EPS, name="self_attn_layer_norm")(x + h)
        h = gelu(keep_rows(Linear(c.encoder_ffn_dim, name="fc1")(x)))
        h = keep_rows(Linear(c.d_model, name="fc2")(h))
        return LayerNorm(_EPS, name="final_layer_norm")(x + h), None


class _DecoderLayer(nn.Module):
    config: BartConfig
    execution: Execution

    @nn.compact
    def __call__(self, x, kept, mask, cross_mask, encoder_states, end):
        """`kept` is the layer's (k, v, cross_k, cross_v) or None; returns what is new of it."""
        c = self.config
        attention = _Attention(
            c.d_model, c.decoder_attention_heads, self.execution, name="self_attn"
        )
        k, v = attention.keys_values(x)
        if kept is not None:
            k = jax.lax.dynamic_update_slice_in_dim(kept[0], k.astype(kept[0].dtype), end, 1)
            v = jax.lax.dynamic_update_slice_in_dim(kept[1], v.astype(kept[1].dtype), end, 1)
        x = LayerNorm(_EPS, name="self_attn_layer_norm")(x + attention(x, k, v, mask))

        cross = _Attention(
            c.d_model, c.decoder_attention_heads, self.execution, name="encoder_attn"
        )
        if encoder_states is None:
            cross_k, cross_v = kept[2:]  # pyright: ignore[reportOptionalSubscript]
        else:
            cross_k, cross_v = cross.keys_values(encoder_states)
            if kept is not None:
                cross_k, cross_v = (y.astype(kept[0].dtype) for y in (cross_k, cross_v))
        h = cross(x, cross_k, cross_v, cross_mask)
        x = LayerNorm(_EPS, name="encoder_attn_layer_norm")(x + h)

        h = gelu(keep_rows(Linear(c.decoder_ffn_dim, name="fc1")(x)))
        h = keep_rows(Linear(c.d_model, name="fc2")(h))
        x = LayerNorm(_EPS, name="final_layer_norm")(x + h)
        if kept is None:
            return x, None
        # Handing unchanged cross keys back would copy them at every step.
        return x, (k, v) if encoder_states is None else (k, v, cross_k, cross_v)


class _Stack(nn.Module):
    """What the encoder and the decoder share: positions, the first norm, the layers."""

    config: BartConfig
    execution: Execution = Execution()

    def _embed(self, inputs_embeds, positions):
        table = self.embed_positions(positions + POSITION_OFFSET)[None]
        return self.layernorm_embedding(inputs_embeds.astype(table.dtype) + table)

    def _check_length(self, length):
        limit = self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"{length} positions, but the model has {limit}")


class BartEncoder(_Stack):
    """Bidirectional, post-norm."""

    def setup(self):
        """Position table, first norm, layers."""
        c = self.config
        self.embed_positions = Embed(c.max_position_embeddings + POSITION_OFFSET, c.d_model)
        self.layernorm_embedding = LayerNorm(_EPS)
        layers = scan_layers(
            _EncoderLayer, length=c.encoder_layers, num_broadcast=1, execution=self.execution
        )
        self.layers = layers(c, self.execution)

    def __call__(
        self, inputs_embeds: Float[Array, "B S D"], valid: Bool[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        """See `Florence2.encode`."""
        S = inputs_embeds.shape[1]
        self._check_length(S)
        x = self._embed(inputs_embeds, jnp.arange(S))
        x, _ = self.layers(x, None, None if valid is None else padding_mask(valid))
        return x


class BartDecoder(_Stack):
    """Causal, with attention to the encoder's states; post-norm."""

    def setup(self):
        """Position table, first norm, layers."""
        c = self.config
        self.embed_positions = Embed(c.max_position_embeddings + POSITION_OFFSET, c.d_model)
        self.layernorm_embedding = LayerNorm(_EPS)
        layers = scan_layers(
            _DecoderLayer, length=c.decoder_layers, num_broadcast=4, execution=self.execution
        )
        self.layers = layers(c, self.execution)

    def __call__(
        self,
        inputs_embeds: Float[Array, "B T D"],
        encoder_states: Float[Array, "B M D"],
        encoder_valid: Bool[Array, "B M"] | None = None,
    ) -> Float[Array, "B T D"]:
        """All positions at once, without a cache."""
        T = inputs_embeds.shape[1]
        self._check_length(T)
        x = self._embed(inputs_embeds, jnp.arange(T))
        cross_mask = None if encoder_valid is None else padding_mask(encoder_valid)
        x, _ = self.layers(x, None, causal_mask(T), cross_mask, encoder_states, None)
        return x

    def extend(
        self,
        inputs_embeds: Float[Array, "B T D"],
        cache: BartCache,
        encoder_states: Float[Array, "B M D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], BartCache]:
        """T more positions after those in the cache."""
        T, S = inputs_embeds.shape[1], cache.k.shape[2]
        self._check_length(S)
        if T > S:
            raise ValueError(f"{T} tokens do not fit into a cache of {S} slots")
        slots = cache.end + jnp.arange(T)
        x = self._embed(inputs_embeds, slots)
        mask = cache_mask(slots[None], jnp.ones((1, S), bool))
        kept = (cache.k, cache.v)
        if encoder_states is None:
            kept = (*kept, cache.cross_k, cache.cross_v)
        cross_mask = padding_mask(cache.cross_valid)
        x, new = self.layers(x, kept, mask, cross_mask, encoder_states, cache.end)
        changes = dict(zip(_LAYERED, new, strict=False))
        return x, dataclasses.replace(cache, end=cache.end + T, **changes)


class Bart(nn.Module):
    """Encoder, decoder and the one token table."""

    config: BartConfig
    execution: Execution = Execution()

    def setup(self):
        """Token table, encoder, decoder."""
        c = self.config
        self.shared = Embed(c.vocab_size, c.d_model)
        self.encoder = BartEncoder(c, self.execution)
        self.decoder = BartDecoder(c, self.execution)
