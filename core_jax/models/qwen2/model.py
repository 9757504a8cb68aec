"""Qwen2 (arXiv 2407.10671) and Qwen2.5 (arXiv 2412.15115), as transformers computes them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.decode.cache import KVCache, read_layer, write_layer
from core_jax.models.qwen2.config import Qwen2Config
from core_jax.nn.layers import Embed, Linear, RMSNorm
from core_jax.nn.stack import scan_layers
from core_jax.ops.attention import (
    causal_mask,
    dot_product_attention,
    padding_mask,
    whole_sequence_mask,
)
from core_jax.ops.execution import Execution
from core_jax.ops.rope import apply_rope, rope_angles
from core_jax.ops.splash import Causal
from core_jax.sharding import constrain


class _Attention(nn.Module):
    config: Qwen2Config
    execution: Execution

    @nn.compact
    def __call__(self, x, mask, rope, cached):
        """`cached` is None or (stacked keys, stacked values, layer, first slot to write)."""
        c = self.config
        B, T, D = x.shape
        widths = {"q_proj": c.num_attention_heads, "k_proj": c.kv_heads, "v_proj": c.kv_heads}
        q, k, v = (
            Linear(heads * c.head_size, name=name)(x).reshape(B, T, heads, c.head_size)
            for name, heads in widths.items()
        )
        q = constrain(apply_rope(q, *rope), "batch", "seq", "act_heads", None)
        k = apply_rope(k, *rope)
        stacks = None
        if cached is not None:
            keys, values, layer, start = cached
            stacks = (write_layer(keys, k, layer, start), write_layer(values, v, layer, start))
            k, v = (read_layer(stack, layer) for stack in stacks)
        out = dot_product_attention(q, k, v, mask=mask, backend=self.execution.attention)
        return Linear(D, use_bias=False, name="o_proj")(out.reshape(B, T, -1)), stacks


class _Mlp(nn.Module):
    config: Qwen2Config

    @nn.compact
    def __call__(self, x):
        F = self.config.intermediate_size
        gate = Linear(F, use_bias=False, name="gate_proj")(x)
        up = Linear(F, use_bias=False, name="up_proj")(x)
        h = constrain(jax.nn.silu(gate) * up, "batch", "seq", "act_mlp")
        return Linear(x.shape[-1], use_bias=False, name="down_proj")(h)


class _Layer(nn.Module):
    config: Qwen2Config
    execution: Execution

    @nn.compact
    def __call__(self, carry, layer, shared):
        # The cache travels in the carry, whole: each layer writes T slots in place, where caches
        # in the scan's inputs and outputs would be copied once a step.
        x, stacks = carry
        mask, rope, start = shared
        eps = self.config.rms_norm_eps
        cached = None if stacks is None else (*stacks, layer, start)
        h = RMSNorm(eps, name="input_layernorm")(x)
        h, stacks = _Attention(self.config, self.execution, name="self_attn")(
            h, mask, rope, cached
        )
        x = constrain(x + h, "batch", "seq", "act_embed")
        h = RMSNorm(eps, name="post_attention_layernorm")(x)
        x = constrain(x + _Mlp(self.config, name="mlp")(h), "batch", "seq", "act_embed")
        return (x, stacks), None


class Qwen2ForCausalLM(nn.Module):
    """A decoder-only language model.

    `__call__` is the whole forward pass from ids. `embed`, `hidden_states` and `logits` are its
    three parts, for prefixes that are not tokens, for caches, and for losses that avoid holding
    all logits.
    """

    config: Qwen2Config
    execution: Execution = Execution()

    def setup(self):
        """Token table, layers, final normalisation, and a head unless it is tied."""
        c = self.config
        self.embed_tokens = Embed(c.vocab_size, c.hidden_size)
        layers = scan_layers(
            _Layer, length=c.num_hidden_layers, num_broadcast=1, execution=self.execution
        )
        self.layers = layers(c, self.execution)
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = Embed(c.vocab_size, c.hidden_size)  # [V, D], as the tied table

    def __call__(
        self, input_ids: Int[Array, "B T"], valid: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of every position.

        Args:
          input_ids: tokens.
          valid: False at padding (on either side); positions count valid tokens only. Logits at
            padding mean nothing.
        """
        hidden, _ = self.from_embeddings(self.embed(input_ids), valid)
        return self.logits(hidden)

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings."""
        return self.embed_tokens(ids)

    def from_embeddings(
        self, inputs_embeds: Float[Array, "B T D"], valid: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Hidden states of a whole sequence, causally, and None; see `__call__` for `valid`."""
        B, T, _ = inputs_embeds.shape
        mask = whole_sequence_mask(T, self.execution.attention)
        positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
        if valid is not None:
            mask = causal_mask(T) & padding_mask(valid)
            positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        return self.hidden_states(inputs_embeds, positions, mask)

    def hidden_states(
        self,
        inputs_embeds: Float[Array, "B T D"],
        positions: Int[Array, "*axes B T"],
        mask: Bool[Array, "#B #T S"] | Causal,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Final hidden states, after the last normalisation.

        Args:
          inputs_embeds: embeddings, cast to the type of the parameters.
          positions: of each input within its row, for the rotary embeddings (see
            `rotary_tables`).
          mask: which slots an input sees: its own sequence (S = T), or the cache's slots.
          cache: keys and values so far; the inputs are written at `cache.end`. `KVCache.claim`
            gives matching positions, mask and cache.

        Returns:
          Hidden states, and the cache with T more slots (None without one).
        """
        c = self.config
        x = inputs_embeds.astype(self.embed_tokens.embedding.dtype)
        x = constrain(x, "batch", "seq", "act_embed")
        rope = self.rotary_tables(positions)
        stacks, start = (None, None) if cache is None else ((cache.k, cache.v), cache.end)
        layers = jnp.arange(c.num_hidden_layers)
        (x, stacks), _ = self.layers((x, stacks), layers, (mask, rope, start))
        if cache is not None:
            cache = dataclasses.replace(cache, k=stacks[0], v=stacks[1], end=cache.end + x.shape[1])
        return self.norm(x), cache

    def rotary_tables(
        self, positions: Int[Array, "*axes B T"]
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
        """Cosines and sines of the rotary embeddings; [B, T] here, more axes in subclasses."""
        c = self.config
        return rope_angles(positions, head_dim=c.head_size, theta=c.rope_theta)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Output head, in the type of the parameters."""
        return constrain(self._head().attend(hidden), "batch", "seq", "act_vocab")

    def head_table(self) -> Float[Array, "V D"]:
        """The output head's table, for `chunked_token_cross_entropy`."""
        return self._head().embedding

    def _head(self) -> Embed:
        return self.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache of the parameters' type."""
        c = self.config
        return KVCache.allocate(
            layers=c.num_hidden_layers, batch=batch, slots=slots, kv_heads=c.kv_heads,
            head_dim=c.head_size, dtype=self.embed_tokens.embedding.dtype,
        )  # fmt: skip
