"""Florence-2 (arXiv 2311.06242): an image and a prompt in, text out."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.models.florence2.bart import Bart, BartCache
from core_jax.models.florence2.config import Florence2Config
from core_jax.models.florence2.davit import DaViT, Projector
from core_jax.ops.execution import Execution


class Florence2(nn.Module):
    """DaViT tower, image projection, BART encoder and decoder.

    The encoder reads the image tokens, then the prompt. Dropout and stochastic depth of the
    original are left out.
    """

    config: Florence2Config
    execution: Execution = Execution()

    def setup(self):
        """The three parts, named as in the checkpoint."""
        c = self.config
        self.vision_tower = DaViT(c.vision_config, self.execution)
        self.multi_modal_projector = Projector(c.vision_config)
        self.language_model = Bart(c.text_config, self.execution)

    def __call__(
        self,
        pixel_values: Float[Array, "B H W C"],
        input_ids: Int[Array, "B S"],
        decoder_input_ids: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """Logits of the next token after each decoder token.

        Args:
          pixel_values: normalised images.
          input_ids: the prompt, without image placeholders.
          decoder_input_ids: start with the decoder's start token.
        """
        image, prompt = self.encode_image(pixel_values), self.embed_tokens(input_ids)
        states = self.encode(jnp.concatenate([image, prompt.astype(image.dtype)], axis=1))
        hidden = self.decode(self.embed_tokens(decoder_input_ids), states)
        return self.logits(hidden)  # pyright: ignore[reportArgumentType] - no cache, no tuple

    def vision_features(self, pixel_values: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        """The tower's grid for normalised images; its sides are a 32nd of theirs."""
        return self.vision_tower(pixel_values)

    def project_features(self, features: Float[Array, "B h w c"]) -> Float[Array, "B P D"]:
        """Image tokens of the tower's grid, P = 1 + h * w, the mean first.

        Raises:
          ValueError: the grid is larger than the position tables.
        """
        return self.multi_modal_projector(features)

    def encode_image(self, pixel_values: Float[Array, "B H W C"]) -> Float[Array, "B P D"]:
        """Image tokens of normalised images."""
        return self.project_features(self.vision_features(pixel_values))

    def embed_tokens(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings, scaled by sqrt(D) where the configuration says so."""
        c = self.config.text_config
        embeds = self.language_model.shared(ids)
        return embeds * c.d_model**0.5 if c.scale_embedding else embeds

    def encode(
        self, inputs_embeds: Float[Array, "B S D"], valid: Bool[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        """The encoder's states.

        Args:
          inputs_embeds: image tokens and prompt embeddings, without positions.
          valid: False for padding, which nothing attends to; None where there is none.

        Raises:
          ValueError: more inputs than positions.
        """
        return self.language_model.encoder(inputs_embeds, valid)

    def decode(
        self,
        inputs_embeds: Float[Array, "B T D"],
        encoder_states: Float[Array, "B M D"] | None = None,
        encoder_valid: Bool[Array, "B M"] | None = None,
        cache: BartCache | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], BartCache]:
        """The decoder's hidden states; position t sees positions 0..t only.

        Without a cache, positions start at 0 and `encoder_states` is needed. With one, they go
        on where the cache ends; the first call (prefill) passes `encoder_states`, whose keys and
        values the cache then holds, and later calls pass neither them nor `encoder_valid`. The
        caller sees to it that the cache has free slots: past its end the last ones would be
        overwritten, since a traced position cannot raise.

        Args:
          inputs_embeds: token embeddings (or queries), without positions.
          encoder_states: what `encode` returned.
          encoder_valid: False for padded encoder states; None where there is none.
          cache: from `init_cache` or an earlier call.

        Returns:
          The hidden states; with a cache, (hidden states, the new cache).

        Raises:
          ValueError: more tokens than positions or slots, or no encoder states.
        """
        decoder = self.language_model.decoder
        if cache is None:
            if encoder_states is None:
                raise ValueError("decode without a cache needs encoder_states")
            return decoder(inputs_embeds, encoder_states, encoder_valid)
        if encoder_states is not None:
            if encoder_states.shape[1] != cache.cross_k.shape[2]:
                raise ValueError(
                    f"{encoder_states.shape[1]} encoder states, but the cache was made for "
                    f"{cache.cross_k.shape[2]}"
                )
            if encoder_valid is None:
                encoder_valid = jnp.ones(encoder_states.shape[:2], bool)
            cache = dataclasses.replace(cache, cross_valid=encoder_valid)
        elif encoder_valid is not None:
            raise ValueError("encoder_valid belongs to encoder_states; pass both, or neither")
        return decoder.extend(inputs_embeds, cache, encoder_states)

    def init_cache(
        self, batch_size: int, length: int, encoder_length: int, dtype=jnp.float32
    ) -> BartCache:
        """An empty cache; needs no parameters, so it may be called on an unbound module.

        Args:
          batch_size: B.
          length: S, the most tokens the decoder will see.
          encoder_length: M, image tokens and prompt.
          dtype: of keys and values; the parameters' type, as a rule.

        Raises:
          ValueError: more slots than positions.
        """
        c = self.config.text_config
        if length > c.max_position_embeddings:
            raise ValueError(
                f"a cache of {length} slots, but the decoder has {c.max_position_embeddings} "
                "positions"
            )
        N = c.decoder_attention_heads
        shape = (c.decoder_layers, batch_size, length, N, c.d_model // N)
        cross = (c.decoder_layers, batch_size, encoder_length, N, c.d_model // N)
        return BartCache(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            cross_k=jnp.zeros(cross, dtype),
            cross_v=jnp.zeros(cross, dtype),
            cross_valid=jnp.zeros((batch_size, encoder_length), bool),
            end=jnp.zeros((), jnp.int32),
        )

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The tied head.

        BART's `final_logits_bias` is a buffer of zeros that transformers' own Florence-2 no
        longer has; the loader verifies the zeros where a checkpoint holds it.
        """
        return self.language_model.shared.attend(hidden)
