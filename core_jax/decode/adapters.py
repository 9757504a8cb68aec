"""Decoders (core_jax.decode.generate) made of the networks in core_jax.models."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.decode.cache import KVCache


@flax.struct.dataclass
class TokenPrefix:
    """A prompt of tokens.

    Attributes:
      ids: int [B, P].
      valid: bool [B, P], False at padding, which may be on the left or on the right; None
        where there is none. Every row needs a valid token.
    """

    ids: jax.Array
    valid: jax.Array | None = None


@flax.struct.dataclass
class EmbeddingPrefix:
    """A prompt of embeddings, such as VLV's caption embeddings.

    Attributes:
      embeds: [B, P, D].
      valid: as in `TokenPrefix`.
    """

    embeds: jax.Array
    valid: jax.Array | None = None


@flax.struct.dataclass
class CausalState:
    """What a prompt left behind.

    Attributes:
      cache: keys and values.
      prefix: slots of the prompt.
    """

    cache: KVCache
    prefix: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class CausalDecoder:
    """A decoder-only network (Qwen2) that continues a `TokenPrefix` or `EmbeddingPrefix`.

    It is a `Decoder` (core_jax.decode.generate) and, without images, a `WindowDecoder`
    (core_jax.decode.target).

    Attributes:
      model: Linen module with `embed`, `hidden_states`, `logits` and `new_cache` as
        `Qwen2ForCausalLM` has them.
    """

    model: nn.Module

    def _apply(self, params: Any, method: str, *args: Any) -> Any:
        return self.model.apply({"params": params}, *args, method=method)

    def prefill(
        self, params: Any, prefix: TokenPrefix | EmbeddingPrefix, *, max_new_tokens: int
    ) -> tuple[Float[Array, "B V"], CausalState]:
        """Runs the whole prefix; the cache gets room for the new tokens afterwards."""
        if isinstance(prefix, TokenPrefix):
            embeds = self._apply(params, "embed", prefix.ids)
        else:
            embeds = prefix.embeds
        B, P, _ = embeds.shape
        valid = jnp.ones((B, P), bool) if prefix.valid is None else prefix.valid.astype(bool)
        cache = self._apply(params, "new_cache", B, P)
        hidden, cache = self._run(params, cache, embeds, valid)
        logits = self._last_logits(params, hidden, valid)
        return logits, CausalState(cache.grow(max_new_tokens), prefix=P)

    def step(
        self, params: Any, state: CausalState, tokens: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], CausalState]:
        """One token a row."""
        logits, state = self.extend(params, state, tokens[:, None])
        return logits[:, 0], state

    def encode_images(self, params: Any, images: Any) -> Any:
        """This network sees none.

        Raises:
          TypeError: always.
        """
        raise TypeError(f"{type(self.model).__name__} is a language model without a vision tower")

    def begin(
        self,
        params: Any,
        prompt: TokenPrefix | EmbeddingPrefix,
        vision: Any = None,
        *,
        max_new_tokens: int,
        window: int,
    ) -> tuple[Float[Array, "B V"], CausalState]:
        """See `WindowDecoder`; `vision` is of another model and is not looked at."""
        del vision
        room = max_new_tokens + (window + 1 if window else 0)
        logits, state = self.prefill(params, prompt, max_new_tokens=room)
        if window:
            state = dataclasses.replace(state, cache=state.cache.per_row())
        return logits, state

    def extend(
        self, params: Any, state: CausalState, tokens: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T V"], CausalState]:
        """T tokens a row, for which there must be room, and the logits after each of them."""
        embeds = self._apply(params, "embed", tokens)
        hidden, cache = self._run(params, state.cache, embeds, jnp.ones(tokens.shape, bool))
        return self._apply(params, "logits", hidden), dataclasses.replace(state, cache=cache)

    def ends(self, state: CausalState) -> Int[Array, " B"]:
        """See `WindowDecoder`."""
        return state.cache.ends()

    def rewind(self, state: CausalState, end: Int[Array, " B"]) -> CausalState:
        """See `WindowDecoder`."""
        return dataclasses.replace(state, cache=state.cache.rewind(end))

    def repeat(self, state: CausalState, times: int) -> CausalState:
        """Every row `times` times."""
        return dataclasses.replace(state, cache=state.cache.repeat(times))

    def reorder(self, state: CausalState, rows: Int[Array, " B"]) -> CausalState:
        """Rows of one prompt change places; their prefix is the same and stays."""
        cache = state.cache.take_rows(rows, shared=state.prefix)
        return dataclasses.replace(state, cache=cache)

    def _run(self, params, cache, embeds, valid: Bool[Array, "B T"]):
        cache, positions, mask = cache.claim(valid)
        return self._apply(params, "hidden_states", embeds, positions, mask, cache)

    def _last_logits(self, params, hidden: Float[Array, "B T D"], valid: Bool[Array, "B T"]):
        """Logits after each row's last valid input; the head runs on those only."""
        T = valid.shape[1]
        last = T - 1 - jnp.argmax(valid[:, ::-1], axis=1)
        picked = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return self._apply(params, "logits", picked)[:, 0]


@flax.struct.dataclass
class EncoderPrefix:
    """What an encoder-decoder network reads.

    Attributes:
      states: [B, M, D], what the model's `encode` returned.
      valid: bool [B, M], False at padding; None where there is none.
    """

    states: jax.Array
    valid: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    """An encoder-decoder network (Florence-2) that answers an `EncoderPrefix`.

    The first token is `decoder_start_token_id` and is not part of what is generated.
    transformers' `forced_eos_token_id` (an end token in the last place, whatever the model says)
    is not applied: a row that ran out of room says so.

    Attributes:
      model: Linen module with `embed_tokens`, `decode`, `init_cache`, `logits` and
        `config.text_config` as `Florence2` has them.
      forced_bos_token_id: the first generated token; what the configuration says if None.
        transformers 5 writes it to generation_config.json, not to config.json.
    """

    model: nn.Module
    forced_bos_token_id: int | None = None

    def _apply(self, params: Any, method: str, *args: Any) -> Any:
        return self.model.apply({"params": params}, *args, method=method)

    def prefill(
        self, params: Any, prefix: EncoderPrefix, *, max_new_tokens: int
    ) -> tuple[Float[Array, "B V"], Any]:
        """Runs the start token; the cache keeps the encoder's keys and values."""
        c = self.model.config.text_config
        B, M, _ = prefix.states.shape
        start = jnp.full((B, 1), c.decoder_start_token_id, jnp.int32)
        embeds = self._apply(params, "embed_tokens", start)
        # The last new token is never read, so its slot serves the start token.
        cache = self.model.init_cache(B, max_new_tokens, M, embeds.dtype)
        hidden, cache = self._apply(
            params, "decode", embeds, prefix.states, prefix.valid, cache
        )
        logits = self._apply(params, "logits", hidden)[:, 0]
        first = self.forced_bos_token_id
        first = c.forced_bos_token_id if first is None else first
        if first is not None:
            forced = jnp.arange(logits.shape[-1]) == first
            logits = jnp.broadcast_to(jnp.where(forced, 0.0, -jnp.inf)[None], logits.shape)
        return logits, cache

    def step(
        self, params: Any, state: Any, tokens: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Any]:
        """One token a row."""
        embeds = self._apply(params, "embed_tokens", tokens[:, None])
        hidden, cache = self._apply(params, "decode", embeds, None, None, state)
        return self._apply(params, "logits", hidden)[:, 0], cache

    def repeat(self, state: Any, times: int) -> Any:
        """Every row `times` times."""
        return state.repeat(times)

    def reorder(self, state: Any, rows: Int[Array, " B"]) -> Any:
        """Rows of one input change places."""
        return state.take_rows(rows)
