"""Decoding with Qwen2.5-VL: prompts with images, windows of several tokens, roll-back."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.decode.cache import KVCache
from core_jax.models.qwen2_5_vl.packing import ImageBatch, PromptPlaces


@flax.struct.dataclass
class ImagePrompt:
    """Prompts of tokens, some of which stand for images.

    Attributes:
      ids: int [B, P].
      positions, next_positions, image_slots: see `place_prompts`.
      valid: bool [B, P], False at padding on either side; None where there is none.
      image_tokens: [R, U, D], what the model's `merge_vision` returned; None without images.
    """

    ids: jax.Array
    positions: jax.Array
    next_positions: jax.Array
    image_slots: jax.Array
    valid: jax.Array | None = None
    image_tokens: jax.Array | None = None

    @classmethod
    def at(
        cls, ids: Any, places: PromptPlaces, *, valid: Any = None, image_tokens: Any = None
    ) -> "ImagePrompt":
        """From host arrays."""
        return cls(
            ids=jnp.asarray(ids, jnp.int32),
            positions=jnp.asarray(places.positions),
            next_positions=jnp.asarray(places.next_positions),
            image_slots=jnp.asarray(places.image_slots),
            valid=None if valid is None else jnp.asarray(valid, bool),
            image_tokens=image_tokens,
        )


@flax.struct.dataclass
class ImageTextState:
    """What a prompt left behind.

    Attributes:
      cache: keys and values.
      offsets: int32 [B]. Text at cache length n has position n + offset on all three axes: an
        image takes fewer positions than tokens. It stays what it is when the cache is rewound.
      prefix: slots of the prompt.
    """

    cache: KVCache
    offsets: jax.Array
    prefix: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class ImageTextDecoder:
    """A `Decoder` (core_jax.decode.generate) that continues an `ImagePrompt`.

    It is a `WindowDecoder` (core_jax.decode.target), too: `extend` and `rewind` are what checking
    drafts needs, several tokens in one pass, and rows that forget the last of them.

    Attributes:
      model: `Qwen2_5_VLForConditionalGeneration`.
    """

    model: nn.Module

    def _apply(self, params: Any, method: str, *args: Any) -> Any:
        return self.model.apply({"params": params}, *args, method=method)

    def encode(
        self, params: Any, images: ImageBatch
    ) -> tuple[Float[Array, "R S Dv"], Float[Array, "R U D"]]:
        """States of the tower, which a drafter with the same tower can share, and image tokens."""
        states = self.encode_images(params, images)
        return states, self._apply(params, "merge_vision", states)

    def encode_images(self, params: Any, images: ImageBatch) -> Float[Array, "R S Dv"]:
        """States of the tower alone, before the merger."""
        args = (jnp.asarray(images.patches), jnp.asarray(images.positions))
        return self._apply(params, "vision_states", *args, jnp.asarray(images.segments))

    def begin(
        self,
        params: Any,
        prompt: ImagePrompt,
        vision: Float[Array, "R S Dv"] | None,
        *,
        max_new_tokens: int,
        window: int,
    ) -> tuple[Float[Array, "B V"], ImageTextState]:
        """See `WindowDecoder`."""
        if vision is not None:
            tokens = self._apply(params, "merge_vision", vision)
            prompt = dataclasses.replace(prompt, image_tokens=tokens)
        room = max_new_tokens + (window + 1 if window else 0)
        logits, state = self.prefill(params, prompt, max_new_tokens=room)
        if window:
            state = dataclasses.replace(state, cache=state.cache.per_row())
        return logits, state

    def ends(self, state: ImageTextState) -> Int[Array, " B"]:
        """See `WindowDecoder`."""
        return state.cache.ends()

    def prefill(
        self, params: Any, prefix: ImagePrompt, *, max_new_tokens: int
    ) -> tuple[Float[Array, "B V"], ImageTextState]:
        """Runs the whole prompt; the cache gets room for the new tokens afterwards.

        Args:
          params: of the model.
          prefix: every row needs a valid token.
          max_new_tokens: free slots. `extend` needs room for all of its inputs, so add the
            largest window to the tokens that are to be kept.
        """
        B, P = prefix.ids.shape
        valid = jnp.ones((B, P), bool) if prefix.valid is None else prefix.valid.astype(bool)
        embeds = self._apply(params, "embed", prefix.ids, prefix.image_slots)
        if prefix.image_tokens is not None:
            embeds = self._apply(
                params, "insert_images", embeds, prefix.image_slots, prefix.image_tokens
            )
        cache, _, mask = self._apply(params, "new_cache", B, P).claim(valid)
        hidden, cache = self._apply(params, "hidden_states", embeds, prefix.positions, mask, cache)
        last = P - 1 - jnp.argmax(valid[:, ::-1], axis=1)
        picked = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        logits = self._apply(params, "logits", picked)[:, 0]
        offsets = prefix.next_positions - cache.lengths()
        return logits, ImageTextState(cache.grow(max_new_tokens), offsets, prefix=P)

    def step(
        self, params: Any, state: ImageTextState, tokens: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], ImageTextState]:
        """One token a row."""
        logits, state = self.extend(params, state, tokens[:, None])
        return logits[:, 0], state

    def extend(
        self,
        params: Any,
        state: ImageTextState,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], ImageTextState]:
        """T tokens of text a row, and the logits after each of them.

        Args:
          params: of the model.
          state: it must have T free slots after `cache.end`.
          tokens: T may be the window of a draft and the token before it.
          valid: False where a row has no token; such a slot is a hole until it is rewound.
        """
        embeds = self._apply(params, "embed", tokens)
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        cache, positions, mask = state.cache.claim(valid)
        positions = positions + state.offsets[:, None]
        positions = jnp.broadcast_to(positions[None], (3, *tokens.shape))
        hidden, cache = self._apply(params, "hidden_states", embeds, positions, mask, cache)
        return self._apply(params, "logits", hidden), dataclasses.replace(state, cache=cache)

    def rewind(self, state: ImageTextState, end: Int[Array, "*B"]) -> ImageTextState:
        """Forgets every slot from `end` on: one number, or one a row (see `KVCache.rewind`)."""
        return dataclasses.replace(state, cache=state.cache.rewind(end))

    def repeat(self, state: ImageTextState, times: int) -> ImageTextState:
        """Every row `times` times."""
        return dataclasses.replace(
            state,
            cache=state.cache.repeat(times),
            offsets=jnp.repeat(state.offsets, times, axis=0),
        )

    def reorder(self, state: ImageTextState, rows: Int[Array, " B"]) -> ImageTextState:
        """Rows of one prompt change places; their prefix is the same and stays."""
        return dataclasses.replace(
            state,
            cache=state.cache.take_rows(rows, shared=state.prefix),
            offsets=jnp.take(state.offsets, rows, mode="clip"),
        )
