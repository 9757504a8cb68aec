"""Qwen2.5-VL (arXiv 2502.13923), as transformers computes it."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.decode.cache import KVCache
from core_jax.models.qwen2.model import Qwen2ForCausalLM
from core_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig
from core_jax.models.qwen2_5_vl.vision import Qwen2_5_VLVision
from core_jax.ops.attention import causal_mask, padding_mask, whole_sequence_mask
from core_jax.ops.execution import Execution
from core_jax.ops.rope import mrope_angles
from core_jax.ops.splash import Causal


class Qwen2_5_VLText(Qwen2ForCausalLM):
    """Qwen2.5 whose positions are [3, B, T]: time, row and column. Parameters are Qwen2's."""

    config: Qwen2_5_VLTextConfig

    def rotary_tables(
        self, positions: Int[Array, "3 B T"]
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
        """Cosines and sines of M-RoPE."""
        c = self.config
        return mrope_angles(
            positions, head_dim=c.head_size, theta=c.rope_theta, sections=c.mrope_section
        )


class Qwen2_5_VLForConditionalGeneration(nn.Module):
    """A vision tower whose image tokens take the places of placeholders in a language model.

    `vision_states` and `merge_vision` are the two halves of the tower (a drafter shares the first
    and has a merger of its own); `embed`, `insert_images`, `hidden_states` and `logits` are the
    parts of the language model. Inputs come from `pack_images` and `place_prompts`.
    """

    config: Qwen2_5_VLConfig
    execution: Execution = Execution()

    def setup(self):
        """The two networks."""
        self.visual = Qwen2_5_VLVision(self.config.vision_config, self.execution)
        self.language_model = Qwen2_5_VLText(self.config.text_config, self.execution)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "3 B T"],
        image_slots: Int[Array, "B T"],
        patches: Float[Array, "R S C"] | None = None,
        patch_positions: Int[Array, "R S 2"] | None = None,
        segments: Int[Array, "R S"] | None = None,
        valid: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of every position.

        Args:
          input_ids: tokens, with placeholders for image tokens.
          positions: see `PromptPlaces`.
          image_slots: see `PromptPlaces`.
          patches: see `ImageBatch`; None (with the two that follow) without images.
          patch_positions: see `ImageBatch`.
          segments: see `ImageBatch`.
          valid: False at padding. Logits at padding mean nothing.
        """
        x = self.embed(input_ids, image_slots)
        if patches is not None and patch_positions is not None and segments is not None:
            tokens = self.image_tokens(patches, patch_positions, segments)
            x = self.insert_images(x, image_slots, tokens)
        T = input_ids.shape[1]
        mask = whole_sequence_mask(T, self.execution.attention)
        if valid is not None:
            mask = causal_mask(T) & padding_mask(valid)
        return self.logits(self.hidden_states(x, positions, mask)[0])

    def vision_states(
        self,
        patches: Float[Array, "R S C"],
        patch_positions: Int[Array, "R S 2"],
        segments: Int[Array, "R S"],
    ) -> Float[Array, "R S Dv"]:
        """States of every patch before the merger; see `Qwen2_5_VLVision.states`."""
        return self.visual.states(patches, patch_positions, segments)

    def merge_vision(self, states: Float[Array, "R S Dv"]) -> Float[Array, "R U D"]:
        """Packed image tokens from `vision_states`."""
        return self.visual.merge(states)

    def image_tokens(
        self,
        patches: Float[Array, "R S C"],
        patch_positions: Int[Array, "R S 2"],
        segments: Int[Array, "R S"],
    ) -> Float[Array, "R U D"]:
        """Packed image tokens, U a row; meaningless at padding."""
        return self.visual(patches, patch_positions, segments)

    def embed(
        self, ids: Int[Array, "B T"], image_slots: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Token embeddings; placeholders may lie outside the table, and get token 0's."""
        if image_slots is not None:
            ids = jnp.where(image_slots >= 0, 0, ids)
        return self.language_model.embed(ids)

    def insert_images(
        self,
        embeds: Float[Array, "B T D"],
        image_slots: Int[Array, "B T"],
        tokens: Float[Array, "R U D"],
    ) -> Float[Array, "B T D"]:
        """Puts image token `image_slots` wherever that is not negative.

        A slot that does not exist gives NaN, not another image's token.
        """
        flat = tokens.astype(embeds.dtype).reshape(-1, tokens.shape[-1])
        picked = flat.at[jnp.maximum(image_slots, 0)].get(mode="fill", fill_value=jnp.nan)
        return jnp.where((image_slots >= 0)[:, :, None], picked, embeds)

    def hidden_states(
        self,
        inputs_embeds: Float[Array, "B T D"],
        positions: Int[Array, "3 B T"],
        mask: Bool[Array, "#B #T S"] | Causal,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """As `Qwen2ForCausalLM.hidden_states`, with three positions."""
        return self.language_model.hidden_states(inputs_embeds, positions, mask, cache)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Output head."""
        return self.language_model.logits(hidden)

    def head_table(self) -> Float[Array, "V D"]:
        """The output head's table, for `chunked_token_cross_entropy`."""
        return self.language_model.head_table()

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache of the parameters' type."""
        return self.language_model.new_cache(batch, slots)
