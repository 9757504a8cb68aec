"""Gemma 3's language model (arXiv 2503.19786), as transformers computes it."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.decode.local_global import (
    LocalGlobalCache,
    View,
    sequence_view,
    update_and_gather,
)
from core_jax.models.gemma3_text.config import Gemma3TextConfig
from core_jax.nn.layers import Embed, Linear, OnePlusRMSNorm, gelu_tanh
from core_jax.nn.stack import remat_layer, scan_layers, scan_pattern
from core_jax.ops.attention import dot_product_attention
from core_jax.ops.execution import Execution
from core_jax.ops.rope import apply_rope, rope_angles
from core_jax.sharding import constrain


class _Attention(nn.Module):
    config: Gemma3TextConfig
    execution: Execution

    @nn.compact
    def __call__(self, x, view, rope, cached):
        """`cached` is None or (stacked keys, stacked values, layer)."""
        c = self.config
        B, T, D = x.shape
        K, N = c.num_key_value_heads, c.num_attention_heads
        widths = {"q_proj": N, "k_proj": K, "v_proj": K}
        q, k, v = (
            Linear(heads * c.head_dim, use_bias=False, name=name)(x)
            .reshape(B, T, heads, c.head_dim)
            for name, heads in widths.items()
        )  # fmt: skip
        q = OnePlusRMSNorm(c.rms_norm_eps, name="q_norm")(q)
        k = OnePlusRMSNorm(c.rms_norm_eps, name="k_norm")(k)
        q = constrain(apply_rope(q, *rope), "batch", "seq", "act_heads", None)
        k, v, mask, stacks = update_and_gather(apply_rope(k, *rope), v, view, cached)
        out = dot_product_attention(
            q, k, v, mask=mask, scale=c.query_pre_attn_scalar**-0.5,
            backend=self.execution.attention,
        )  # fmt: skip
        return Linear(D, use_bias=False, name="o_proj")(out.reshape(B, T, -1)), stacks


class _Mlp(nn.Module):
    config: Gemma3TextConfig

    @nn.compact
    def __call__(self, x):
        F = self.config.intermediate_size
        gate = Linear(F, use_bias=False, name="gate_proj")(x)
        up = Linear(F, use_bias=False, name="up_proj")(x)
        h = constrain(gelu_tanh(gate) * up, "batch", "seq", "act_mlp")
        return Linear(x.shape[-1], use_bias=False, name="down_proj")(h)


class _Layer(nn.Module):
    config: Gemma3TextConfig
    execution: Execution

    @nn.compact
    def __call__(self, carry, layer, shared):
        # The cache travels in the carry, whole; see core_jax.models.qwen2.
        x, stacks = carry
        view, rope = shared
        eps = self.config.rms_norm_eps
        cached = None if stacks is None else (*stacks, layer)
        h = OnePlusRMSNorm(eps, name="input_layernorm")(x)
        h, stacks = _Attention(self.config, self.execution, name="self_attn")(
            h, view, rope, cached
        )
        h = OnePlusRMSNorm(eps, name="post_attention_layernorm")(h)
        x = constrain(x + h, "batch", "seq", "act_embed")
        h = OnePlusRMSNorm(eps, name="pre_feedforward_layernorm")(x)
        h = _Mlp(self.config, name="mlp")(h)
        h = OnePlusRMSNorm(eps, name="post_feedforward_layernorm")(h)
        return (constrain(x + h, "batch", "seq", "act_embed"), stacks), None


class Gemma3ForCausalLM(nn.Module):
    """A decoder-only language model with local and global layers.

    `__call__` is the whole forward pass from ids. `embed`, `hidden_states` and `logits` are its
    three parts, as in `Qwen2ForCausalLM`.
    """

    config: Gemma3TextConfig
    execution: Execution = Execution()

    def setup(self):
        """Token table, layers, final normalisation, and a head unless it is tied."""
        c = self.config
        self.embed_tokens = Embed(c.vocab_size, c.hidden_size)
        if c.local_layers:
            self.local_layers = self._stack(c.local_layers)
        if c.patterns:
            self.global_layers = self._stack(c.patterns)
        self.norm = OnePlusRMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = Embed(c.vocab_size, c.hidden_size)  # [V, D], as the tied table

    def __call__(
        self, input_ids: Int[Array, "B T"], valid: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of every position.

        Args:
          input_ids: tokens.
          valid: False at padding (on either side); positions and windows count valid tokens
            only. Logits at padding mean nothing.
        """
        hidden, _ = self.from_embeddings(self.embed(input_ids), valid)
        return self.logits(hidden)

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings times sqrt(D), a factor that is rounded to the parameters' type."""
        embeds = self.embed_tokens(ids)
        return embeds * jnp.asarray(self.config.hidden_size**0.5, embeds.dtype)

    def from_embeddings(
        self,
        inputs_embeds: Float[Array, "B T D"],
        valid: Bool[Array, "B T"] | None = None,
        blocks: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LocalGlobalCache | None]:
        """Hidden states of a whole sequence, and None.

        Args:
          inputs_embeds: scaled token embeddings, and image tokens, which are not scaled.
          valid: as in `__call__`.
          blocks: the image that an input belongs to, -1 for text; an image's inputs see one
            another in both directions.
        """
        if valid is None:
            valid = jnp.ones(inputs_embeds.shape[:2], bool)
        positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
        view = sequence_view(
            valid, positions, window=self.config.sliding_window, blocks=blocks
        )
        return self.hidden_states(inputs_embeds, positions, view)

    def hidden_states(
        self,
        inputs_embeds: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: View,
        cache: LocalGlobalCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LocalGlobalCache | None]:
        """Final hidden states, after the last normalisation.

        Args:
          inputs_embeds: embeddings, cast to the type of the parameters.
          positions: of each input within its row, for the rotary embeddings.
          mask: what the inputs see. `LocalGlobalCache.claim` gives matching positions, mask and
            cache.
          cache: keys and values so far.

        Returns:
          Hidden states, and the cache with the inputs in it (None without one).
        """
        c = self.config
        x = inputs_embeds.astype(self.embed_tokens.embedding.dtype)
        x = constrain(x, "batch", "seq", "act_embed")
        local_rope = rope_angles(positions, head_dim=c.head_dim, theta=c.rope_local_base_freq)
        full_rope = rope_angles(
            positions, head_dim=c.head_dim, theta=c.rope_theta, factor=c.rope_scaling_factor
        )
        shared = ((mask.local, local_rope), (mask.full, full_rope))
        local: Any = None
        full: Any = None
        if cache is not None:
            local, full = (cache.local_k, cache.local_v), (cache.full_k, cache.full_v)
        x, local, full = self._run_layers((x, local, full), shared)
        if cache is not None:
            assert mask.end is not None
            cache = cache.written(local, full, mask.end)
        return self.norm(x), cache

    def _stack(self, length: int) -> nn.Module:
        # Declares the parameters; `_run_layers` runs the layers.
        layers = scan_layers(_Layer, length=length, execution=Execution(), num_broadcast=1)
        return layers(self.config, self.execution)

    def _run_layers(self, carry: Any, shared: Any) -> Any:
        """All layers in their order; (inputs, the stacks of both kinds) in and out."""
        c = self.config
        if self.is_initializing():  # declares the parameters; the order is of no interest
            x, *_ = carry
            if c.local_layers:
                self.local_layers((x, None), jnp.arange(c.local_layers), shared[0])
            if c.patterns:
                self.global_layers((x, None), jnp.arange(c.patterns), shared[1])
            return carry
        layer = remat_layer(_Layer, self.execution.remat)(c, self.execution, parent=None)

        def local(params, carry, number):
            x, local, full = carry
            (x, local), _ = layer.apply({"params": params}, (x, local), number, shared[0])
            return x, local, full

        def full(params, carry, number):
            x, local, full = carry
            (x, full), _ = layer.apply({"params": params}, (x, full), number, shared[1])
            return x, local, full

        stacks = (
            self.local_layers.variables["params"] if c.local_layers else None,
            self.global_layers.variables["params"] if c.patterns else None,
        )
        return scan_pattern(
            local, full, carry, stacks, counts=(c.local_layers, c.patterns),
            every=c.sliding_window_pattern, in_place=carry[1] is not None,
        )  # fmt: skip

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Output head, in the type of the parameters."""
        logits = constrain(self._head().attend(hidden), "batch", "seq", "act_vocab")
        cap = self.config.final_logit_softcapping
        return logits if cap is None else jnp.tanh(logits / cap) * cap

    def head_table(self) -> Float[Array, "V D"]:
        """The output head's table, for `chunked_token_cross_entropy`."""
        return self._head().embedding

    def _head(self) -> Embed:
        return self.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def new_cache(self, batch: int, slots: int, draft: int = 0) -> LocalGlobalCache:
        """An empty cache of the parameters' type; `draft` tokens at a time may be taken back."""
        c = self.config
        return LocalGlobalCache.allocate(
            local_layers=c.local_layers, full_layers=c.patterns, batch=batch, slots=slots,
            kv_heads=c.num_key_value_heads, head_dim=c.head_dim, window=c.sliding_window,
            draft=draft, dtype=self.embed_tokens.embedding.dtype,
        )  # fmt: skip
