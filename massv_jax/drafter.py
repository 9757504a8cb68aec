"""The drafter: a small language model that sees through the target's own, frozen eyes.

Parameters are a dictionary of `projector` and `language_model`; the tower's are a tree of their
own, the target's, and never change. The tower runs once for both models: a drafter takes its
features, not pixels.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.decode.adapters import CausalDecoder
from core_jax.decode.gemma3 import Gemma3Decoder
from core_jax.decode.qwen2_5_vl import ImageTextDecoder
from core_jax.models.gemma3_text import Gemma3TextConfig
from core_jax.models.qwen2_5_vl.vision import Qwen2_5_VLVision
from core_jax.models.siglip.model import SiglipVisionModel
from core_jax.ops.attention import causal_mask, padding_mask, whole_sequence_mask
from core_jax.ops.execution import Execution
from massv_jax.draft_prompts import PoolingDecoder
from massv_jax.drafter_config import DrafterConfig
from massv_jax.drafter_model import make_model
from massv_jax.projector import make_projector, pool_tokens

PROJECTOR, LANGUAGE_MODEL = "projector", "language_model"
Params = Any


@dataclasses.dataclass(frozen=True)
class Drafter:
    """Pure functions of parameters; hashable, holds no arrays.

    Attributes:
      config: what it is made of.
      execution: backends and rematerialisation.
    """

    config: DrafterConfig
    execution: Execution = Execution()

    @property
    def model(self) -> nn.Module:
        """The network without a tower, with the methods that decoders use."""
        return make_model(self.config, self.execution)

    @property
    def projector(self) -> nn.Module | None:
        """The projector's module."""
        return make_projector(self.config)

    @property
    def sees_images(self) -> bool:
        """Whether image tokens stand in its prompts."""
        return self.config.kind != "text"

    @property
    def decoder(self) -> Any:
        """Its `WindowDecoder` (core_jax.decode.target), for `decoder_params`.

        It takes the target's own prompts and the features of the target's tower, except that
        drafters that pool, or see no image, have prompts of their own (massv_jax.draft_prompts).
        """
        if self.config.kind == "prefix":
            from core_jax.decode.prefix import PrefixDecoder

            assert self.projector is not None
            return PrefixDecoder(self.projector, self.model)
        if isinstance(self.config.text, Gemma3TextConfig):
            return Gemma3Decoder(self.model)
        if self.config.kind == "text":
            return CausalDecoder(self.model)
        return (
            PoolingDecoder(self.model) if self.config.pooling > 1 else ImageTextDecoder(self.model)
        )

    def decoder_params(self, params: Params) -> Params:
        """The tree that `decoder` takes, of the drafter's parameters."""
        return params[LANGUAGE_MODEL] if self.config.kind == "text" else params

    def _model_params(self, params: Params) -> Params:
        """The tree that `model` takes."""
        alone = self.config.kind in ("prefix", "text")
        return {"params": params[LANGUAGE_MODEL] if alone else params}

    def features(self, tower: Params, *images: Array) -> Float[Array, "..."]:
        """What the frozen tower says, without gradients.

        Args:
          tower: the target's tower (see massv_jax.loading).
          *images: of Qwen2.5-VL patches [R, S, C], positions [R, S, 2] and segments [R, S] (see
            `pack_images`); of Gemma 3 pixels [M, height, width, 3].

        Returns:
          [R, S, Dv] patch states, or a grid [M, h, w, E] of Gemma 3's tower.
        """
        kind, target = self.config.kind, self.config.target
        if kind in ("merger", "mlp"):
            found: Any = Qwen2_5_VLVision(target.vision_config, self.execution).apply(
                {"params": tower}, *images, method="states"
            )
        elif kind == "gemma":
            found = SiglipVisionModel(target.vision_config, self.execution).apply(
                {"params": tower}, *images
            )
        else:
            raise ValueError(f"a {kind!r} drafter runs no tower of its own")
        return jax.lax.stop_gradient(found)

    def image_tokens(
        self, params: Params, features: Array, leaders: Int[Array, "R U"] | None = None
    ) -> Float[Array, "R U D"]:
        """Image tokens of the drafter's width.

        Args:
          params: of the drafter.
          features: from `features`, or from a target that shares its tower's.
          leaders: of the squares that "merger" and "mlp" pool (see `pool_tokens`), as places in
            their own row; None where `config.pooling` is 1.

        Returns:
          [R, U, D]: packed as the features are; [M, P, D] for "gemma", [B, Q, D] for "prefix".
        """
        kind = self.config.kind
        if kind == "prefix":
            assert self.projector is not None
            tokens: Any = self.projector.apply({"params": params[PROJECTOR]}, features)
            return tokens
        method = "project_features" if kind == "gemma" else "merge_vision"
        tokens = self.model.apply({"params": params}, features, method=method)
        if self.config.pooling > 1 and kind != "gemma":
            assert leaders is not None, "a pooling drafter needs `leaders`"
            tokens = pool_tokens(tokens, leaders)
        return tokens

    def hidden(
        self,
        params: Params,
        ids: Int[Array, "B T"],
        valid: Bool[Array, "B T"] | None = None,
        tokens: Float[Array, "B U D"] | None = None,
        slots: Int[Array, "B T"] | None = None,
        positions: Int[Array, "3 B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of whole sequences, for training and for checking decoders.

        Args:
          params: of the drafter.
          ids: with placeholders for image tokens.
          valid: False at padding; None where that follows the tokens, which do not see it then,
            so that fused attention can serve. States at padding mean nothing.
          tokens: image tokens of each row (its own, not the batch's); None without images.
          slots: which of its row's tokens stands where; negative for text. Not for "gemma",
            whose placeholders are taken in their order.
          positions: time, row and column ("merger", "mlp").
        """
        weights = self._model_params(params)

        def call(method: str, *args: Any) -> Any:
            return self.model.apply(weights, *args, method=method)

        if self.config.kind == "gemma":
            embeds = call("embed_prompt", ids, tokens)
            blocks = None if tokens is None else call("image_blocks", ids)
            return call("from_embeddings", embeds, valid, blocks)[0]
        if slots is not None:
            ids = jnp.where(slots >= 0, 0, ids)
        embeds = call("embed", ids)
        if tokens is not None:
            assert slots is not None
            embeds = insert_tokens(embeds, slots, tokens)
        if positions is None:
            return call("from_embeddings", embeds, valid)[0]
        T = ids.shape[1]
        mask = whole_sequence_mask(T, self.execution.attention)
        if valid is not None:
            mask = causal_mask(T) & padding_mask(valid)
        return call("hidden_states", embeds, positions, mask)[0]

    def head_table(self, params: Params) -> Float[Array, "V D"]:
        """The output head's table."""
        text = params[LANGUAGE_MODEL]
        name = "embed_tokens" if self.config.text.tie_word_embeddings else "lm_head"
        return text[name]["embedding"]


def insert_tokens(
    embeds: Float[Array, "B T D"], slots: Int[Array, "B T"], tokens: Float[Array, "B U D"]
) -> Float[Array, "B T D"]:
    """Puts a row's image token `slots` wherever that is not negative; NaN if there is none."""
    picked = jnp.take_along_axis(
        tokens.astype(embeds.dtype), jnp.maximum(slots, 0)[:, :, None], axis=1, mode="fill",
        fill_value=jnp.nan,
    )  # fmt: skip
    return jnp.where((slots >= 0)[:, :, None], picked, embeds)
