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
class _CausalState:
    cache: KVCache
    prefix: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class CausalDecoder:
    """A decoder-only network (Qwen2) that continues a `TokenPrefix` or `EmbeddingPrefix`.

    Attributes:
      model: Linen module with `embed`, `hidden_states`, `logits` and `new_cache` as
        `Qwen2ForCausalLM` has them.
    """

    model: nn.Module

    def _apply(self, params: Any, method: str, *args: Any) -> Any:
        return self.model.apply({"params": params}, *args, method=method)

    def prefill(
        self, params: Any, prefix: TokenPrefix | EmbeddingPrefix, *, max_new_tokens: int
    ) -> tuple[Float[Array, "B V"], _CausalState]:
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
        return logits, _CausalState(cache.grow(max_new_tokens), prefix=P)

    def step(
        self, params: Any, state: _CausalState, tokens: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], _CausalState]:
        """One token a row."""
        embeds = self._apply(params, "embed", tokens[:, None])
        valid = jnp.ones(tokens.shape, bool)[:, None]
        hidden, cache = self._run(params, state.cache, embeds, valid)
        return self._apply(params, "logits", hidden)[:, 0], state.replace(cache=cache)

    def repeat(self, state: _CausalState, times: int) -> _CausalState:
        """Every row `times` times."""
        return state.replace(cache=state.cache.repeat(times))

    def reorder(self, state: _CausalState, rows: Int[Array, " B"]) -> _CausalState:
        """Rows of one prompt change places; their prefix is the same and stays."""
        return state.replace(cache=state.cache.take_rows(rows, shared=state.prefix))

    def _run(self, params, cache, embeds, valid: Bool[Array, "B T"]):
        cache, positions, mask = cache.claim(valid)
        return self._apply(params, "hidden_states", embeds, positions, mask, cache)

    def _last_logits(self, params, hidden: Float[Array, "B T D"], valid: Bool[Array, "B T"]):
        """Logits after each row's last valid input; the head runs on those only."""
        T = valid.shape[1]
        last = T - 1 - jnp.argmax(valid[:, ::-1], axis=1)
        picked = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return self._apply(params, "logits", picked)[:, 0]
