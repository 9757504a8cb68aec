"""Gemma 3 (arXiv 2503.19786): images and text in, text out."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.decode.local_global import LocalGlobalCache, View
from core_jax.models.gemma3.config import Gemma3Config
from core_jax.models.gemma3_text.model import Gemma3ForCausalLM
from core_jax.models.siglip.model import SiglipVisionModel
from core_jax.nn.layers import OnePlusRMSNorm
from core_jax.ops.execution import Execution
from core_jax.ops.matmul import matmul


class PooledProjector(nn.Module):
    """Patch features to image tokens: mean over squares of patches, normalisation, a matrix.

    Attributes:
      tokens_per_side: side of the grid of image tokens.
      features: D of the language model.
      eps: epsilon of the normalisation.
    """

    tokens_per_side: int
    features: int
    eps: float

    @nn.compact
    def __call__(self, patches: Float[Array, "B h w E"]) -> Float[Array, "B P D"]:
        """Image tokens, row by row."""
        B, h, w, E = patches.shape
        side = self.tokens_per_side
        squares = patches.reshape(B, side, h // side, side, w // side, E)
        pooled = jnp.mean(squares, axis=(2, 4)).reshape(B, side * side, E)
        pooled = OnePlusRMSNorm(self.eps, name="mm_soft_emb_norm")(pooled)
        # transformers starts from zeros, with which a fresh projector would never learn to look.
        matrix = self.param(
            "mm_input_projection_weight",
            nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
            (E, self.features),
        )
        return matmul(pooled.astype(matrix.dtype), matrix)


class Gemma3ForConditionalGeneration(nn.Module):
    """SigLIP tower, pooled projector, language model.

    A row's prompt holds `mm_tokens_per_image` placeholders (`image_token_index`) for each of its
    images, between a begin and an end token. `embed_prompt` puts the image tokens there and
    `image_blocks` says which inputs see one another in both directions; `hidden_states`,
    `logits` and `new_cache` are the language model's, as in `Gemma3ForCausalLM`.
    """

    config: Gemma3Config
    execution: Execution = Execution()

    def setup(self):
        """The three parts, named as in the checkpoint."""
        c = self.config
        self.vision_tower = SiglipVisionModel(c.vision_config, self.execution)
        self.multi_modal_projector = PooledProjector(
            c.tokens_per_side, c.text_config.hidden_size, c.vision_config.layer_norm_eps
        )
        self.language_model = Gemma3ForCausalLM(c.text_config, self.execution)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        pixel_values: Float[Array, "M height width c"] | None = None,
        valid: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of every position.

        Args:
          input_ids: prompts with placeholders.
          pixel_values: normalised images, M / B for each row, in the order of the rows; None for
            text. `check_placeholders` (core_jax.models.gemma3.prompt) checks on the host that
            rows have the placeholders of their images: here they cannot be counted.
          valid: False at padding (on either side).
        """
        tokens = None
        if pixel_values is not None:
            tokens = self.encode_image(pixel_values)
            tokens = tokens.reshape(input_ids.shape[0], -1, tokens.shape[-1])
        blocks = None if pixel_values is None else self.image_blocks(input_ids)
        hidden, _ = self.from_embeddings(self.embed_prompt(input_ids, tokens), valid, blocks)
        return self.logits(hidden)

    def vision_features(
        self, pixel_values: Float[Array, "M height width c"]
    ) -> Float[Array, "M h w E"]:
        """The tower's grid of patch features; what another model's projector may read, too."""
        return self.vision_tower(pixel_values)

    def project_features(self, features: Float[Array, "M h w E"]) -> Float[Array, "M P D"]:
        """Image tokens of the tower's grid."""
        return self.multi_modal_projector(features)

    def encode_image(
        self, pixel_values: Float[Array, "M height width c"]
    ) -> Float[Array, "M P D"]:
        """Image tokens of normalised images."""
        return self.project_features(self.vision_features(pixel_values))

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Scaled token embeddings; a placeholder outside the vocabulary reads as token 0."""
        c = self.config
        if c.image_token_index >= c.text_config.vocab_size:
            ids = jnp.where(ids == c.image_token_index, 0, ids)
        return self.language_model.embed(ids)

    def embed_prompt(
        self, ids: Int[Array, "B T"], image_tokens: Float[Array, "B P D"] | None
    ) -> Float[Array, "B T D"]:
        """Embeddings of prompts, with image tokens in the places of the placeholders.

        Args:
          ids: prompts.
          image_tokens: those of each row, all its images in order. A row with fewer
            placeholders leaves the last ones unused.
        """
        embeds = self.embed(ids)
        if image_tokens is None:
            return embeds
        is_image = ids == self.config.image_token_index
        place = jnp.cumsum(is_image, axis=1) - 1
        place = jnp.clip(place, 0, image_tokens.shape[1] - 1)
        tokens = jnp.take_along_axis(image_tokens, place[:, :, None], axis=1)
        return jnp.where(is_image[:, :, None], tokens.astype(embeds.dtype), embeds)

    def image_blocks(self, ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """The image that each input belongs to, -1 for text; a run of placeholders is an image."""
        is_image = ids == self.config.image_token_index
        before = jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
        number = jnp.cumsum(is_image & ~before, axis=1, dtype=jnp.int32) - 1
        return jnp.where(is_image, number, -1)

    def from_embeddings(
        self,
        inputs_embeds: Float[Array, "B T D"],
        valid: Bool[Array, "B T"] | None = None,
        blocks: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LocalGlobalCache | None]:
        """Hidden states of a whole sequence, and None; see `Gemma3ForCausalLM`."""
        return self.language_model.from_embeddings(inputs_embeds, valid, blocks)

    def hidden_states(
        self,
        inputs_embeds: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: View,
        cache: LocalGlobalCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LocalGlobalCache | None]:
        """Final hidden states and the cache; see `Gemma3ForCausalLM`."""
        return self.language_model.hidden_states(inputs_embeds, positions, mask, cache)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Output head, in the type of the parameters."""
        return self.language_model.logits(hidden)

    def head_table(self) -> Float[Array, "V D"]:
        """The output head's table, for `chunked_token_cross_entropy`."""
        return self.language_model.head_table()

    def new_cache(self, batch: int, slots: int, draft: int = 0) -> LocalGlobalCache:
        """An empty cache of the parameters' type; `draft` tokens at a time may be taken back."""
        return self.language_model.new_cache(batch, slots, draft)
