"""Decoding with Gemma 3: prompts with images, windows of several tokens, roll-back."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.decode.local_global import LocalGlobalCache


@flax.struct.dataclass
class Gemma3Prompt:
    """Prompts of tokens, some of which stand for images.

    Attributes:
      ids: int [B, P].
      valid: bool [B, P], False at padding on either side; None where there is none. Every row
        needs a valid token.
      image_tokens: [B, I, D], what `encode_image` gave for each row's images, in order; rows with
        fewer images end in anything. None without images, as for the text-only model.
    """

    ids: jax.Array
    valid: jax.Array | None = None
    image_tokens: jax.Array | None = None


@flax.struct.dataclass
class Gemma3State:
    """What a prompt left behind.

    Attributes:
      cache: keys and values.
    """

    cache: LocalGlobalCache


@dataclasses.dataclass(frozen=True)
class Gemma3Decoder:
    """A `Decoder` (core_jax.decode.generate) that continues a `Gemma3Prompt`.

    It is a `WindowDecoder` (core_jax.decode.target), too: `extend` and `rewind` are what checking
    drafts needs, several tokens in one pass, and rows that forget the last of them.

    Attributes:
      model: `Gemma3ForConditionalGeneration` or `Gemma3ForCausalLM`.
      draft: tokens of a draft. `rewind` may go back draft + 2 tokens, no more: local layers hold
        only so many beyond their window.
    """

    model: nn.Module
    draft: int = 0

    def _apply(self, params: Any, method: str, *args: Any) -> Any:
        return self.model.apply({"params": params}, *args, method=method)

    def prefill(
        self, params: Any, prefix: Gemma3Prompt, *, max_new_tokens: int
    ) -> tuple[Float[Array, "B V"], Gemma3State]:
        """Runs the whole prompt.

        Args:
          params: of the model.
          prefix: the prompt.
          max_new_tokens: free slots. What `extend` writes beyond them is lost without harm to
            the tokens before, so add the draft's tokens if all of them are to be kept.
        """
        B, P = prefix.ids.shape
        valid = jnp.ones((B, P), bool) if prefix.valid is None else prefix.valid.astype(bool)
        blocks = None
        if prefix.image_tokens is None:
            embeds = self._apply(params, "embed", prefix.ids)
        else:
            embeds = self._apply(params, "embed_prompt", prefix.ids, prefix.image_tokens)
            blocks = self._apply(params, "image_blocks", prefix.ids)
        cache = self._apply(params, "new_cache", B, P + max_new_tokens, self.draft)
        cache, positions, view = cache.claim(valid, blocks)
        hidden, cache = self._apply(params, "hidden_states", embeds, positions, view, cache)
        last = P - 1 - jnp.argmax(valid[:, ::-1], axis=1)
        picked = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return self._apply(params, "logits", picked)[:, 0], Gemma3State(cache)

    def encode_images(
        self, params: Any, images: Float[Array, "M height width c"]
    ) -> Float[Array, "M h w E"]:
        """The tower's grids for normalised images; a drafter with the same tower shares them."""
        return self._apply(params, "vision_features", images)

    def begin(
        self,
        params: Any,
        prompt: Gemma3Prompt,
        vision: Float[Array, "M h w E"] | None,
        *,
        max_new_tokens: int,
        window: int,
    ) -> tuple[Float[Array, "B V"], Gemma3State]:
        """See `WindowDecoder`; `vision` has the same number of images for each row of `prompt`."""
        if vision is not None:
            tokens = self._apply(params, "project_features", vision)
            rows = tokens.reshape(prompt.ids.shape[0], -1, tokens.shape[-1])
            prompt = dataclasses.replace(prompt, image_tokens=rows)
        room = max_new_tokens + (window + 1 if window else 0)
        own = dataclasses.replace(self, draft=window)
        return own.prefill(params, prompt, max_new_tokens=room)

    def ends(self, state: Gemma3State) -> Int[Array, " B"]:
        """See `WindowDecoder`."""
        return state.cache.ends()

    def step(
        self, params: Any, state: Gemma3State, tokens: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Gemma3State]:
        """One token a row."""
        logits, state = self.extend(params, state, tokens[:, None])
        return logits[:, 0], state

    def extend(
        self,
        params: Any,
        state: Gemma3State,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], Gemma3State]:
        """T tokens of text a row, and the logits after each of them.

        Args:
          params: of the model.
          state: from `prefill`, or an earlier call.
          tokens: T may be the draft and the token before it.
          valid: False where a row has no token.
        """
        embeds = self._apply(params, "embed", tokens)
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        cache, positions, view = state.cache.claim(valid)
        hidden, cache = self._apply(params, "hidden_states", embeds, positions, view, cache)
        return self._apply(params, "logits", hidden), dataclasses.replace(state, cache=cache)

    def rewind(self, state: Gemma3State, end: Int[Array, "*B"]) -> Gemma3State:
        """Forgets every token from `end` on: one number, or one a row."""
        return dataclasses.replace(state, cache=state.cache.rewind(end))

    def repeat(self, state: Gemma3State, times: int) -> Gemma3State:
        """Every row `times` times."""
        return dataclasses.replace(state, cache=state.cache.repeat(times))

    def reorder(self, state: Gemma3State, rows: Int[Array, " B"]) -> Gemma3State:
        """Row i continues from the old row `rows[i]`."""
        return dataclasses.replace(state, cache=state.cache.take_rows(rows))
