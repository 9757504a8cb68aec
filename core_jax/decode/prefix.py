"""Language models whose image is a prefix of embeddings (the VLV captioner and its drafters)."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core_jax.decode.adapters import CausalDecoder, CausalState, EmbeddingPrefix


@flax.struct.dataclass
class PrefixPrompt:
    """What follows the image, for each row.

    Attributes:
      ids: int [B, P]; P may be 0.
      valid: bool [B, P], False at padding.
      has_image: bool [B]; rows without need a valid token.
    """

    ids: jax.Array
    valid: jax.Array
    has_image: jax.Array


@dataclasses.dataclass(frozen=True)
class PrefixDecoder:
    """A `WindowDecoder` (core_jax.decode.target) that reads projected states, then text.

    Its parameters are {"projector": ..., "language_model": ...}; others may lie beside them.

    Attributes:
      projector: Linen module, [B, Q, E] -> [B, Q, D].
      language_model: as `CausalDecoder` takes it.
    """

    projector: nn.Module
    language_model: nn.Module

    def encode_images(self, params: Any, images: Any) -> Float[Array, "B Q E"]:
        """The states themselves, one image a row: whoever shares them has made them."""
        del params
        return images

    def begin(
        self,
        params: Any,
        prompt: PrefixPrompt,
        vision: Float[Array, "B Q E"] | None,
        *,
        max_new_tokens: int,
        window: int,
    ) -> tuple[Float[Array, "B V"], CausalState]:
        """Runs image and prompt; see `WindowDecoder`. `vision` has B rows, some of them unused."""
        lm = {"params": params["language_model"]}
        embeds = self.language_model.apply(lm, prompt.ids, method="embed")
        assert isinstance(embeds, jax.Array)
        valid = prompt.valid
        if vision is not None:
            prefix = self.projector.apply({"params": params["projector"]}, vision)
            assert isinstance(prefix, jax.Array)
            embeds = jnp.concatenate([prefix.astype(embeds.dtype), embeds], axis=1)
            seen = jnp.broadcast_to(prompt.has_image[:, None], prefix.shape[:2])
            valid = jnp.concatenate([seen, valid], axis=1)
        return CausalDecoder(self.language_model).begin(
            params["language_model"], EmbeddingPrefix(embeds, valid), None,
            max_new_tokens=max_new_tokens, window=window,
        )  # fmt: skip

    def extend(
        self, params: Any, state: CausalState, tokens: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T V"], CausalState]:
        """See `WindowDecoder`."""
        lm = CausalDecoder(self.language_model)
        return lm.extend(params["language_model"], state, tokens)

    def ends(self, state: CausalState) -> Int[Array, " B"]:
        """See `WindowDecoder`."""
        return state.cache.ends()

    def rewind(self, state: CausalState, end: Int[Array, " B"]) -> CausalState:
        """See `WindowDecoder`."""
        return CausalDecoder(self.language_model).rewind(state, end)
