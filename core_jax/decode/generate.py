"""Generation with any decoder: greedy and sampling."""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from core_jax.decode.sampling import SamplingRule, choose_token, penalize_repetition

State = Any
Prefix = Any


class Decoder(Protocol):
    """What generation needs of a network. Implementations are hashable and hold no arrays.

    The state is any pytree; it comes from `prefill` and goes through `step`.
    """

    def prefill(self, params: Any, prefix: Prefix, *, max_new_tokens: int) -> tuple[Any, State]:
        """Logits [B, V] of the first new token, and a state with room for the new tokens."""
        ...

    def step(self, params: Any, state: State, tokens: Any) -> tuple[Any, State]:
        """Appends a token to every row: int32 [B] -> logits [B, V] of the next."""
        ...

    def repeat(self, state: State, times: int) -> State:
        """Every row `times` times in succession."""
        ...

    def reorder(self, state: State, rows: Any) -> State:
        """Row i continues from the old row `rows[i]`, which has the same prefix."""
        ...


@flax.struct.dataclass
class Generated:
    """What was generated; R rows of at most N tokens.

    Attributes:
      tokens: int32 [R, N]; an end token is kept, what follows is `pad_id`.
      lengths: int32 [R], tokens of each row, the end token included.
      finished: bool [R], whether a row ended by itself, not by running out of room.
      scores: float32 [R]. From `generate` the sum of the tokens' log probabilities under the
        model (before any sampling rule); from `beam_search` the length-penalised score.
    """

    tokens: jax.Array
    lengths: jax.Array
    finished: jax.Array
    scores: jax.Array


def generate(
    decoder: Decoder,
    params: Any,
    prefix: Prefix,
    *,
    max_new_tokens: int,
    eos_ids: int | Sequence[int] = (),
    pad_id: int = 0,
    rule: SamplingRule = SamplingRule(),  # noqa: B008 - frozen
    key: Key[Array, ""] | None = None,
    row_seeds: Int[Array, " B"] | None = None,
) -> Generated:
    """Generates until every row has ended or has `max_new_tokens`; compiled as one program.

    Args:
      decoder: the network.
      params: its parameters.
      prefix: what the decoder's `prefill` takes.
      max_new_tokens: N.
      eos_ids: tokens that end a row.
      pad_id: what fills a row after its end.
      rule: greedy by default.
      key: needed to sample.
      row_seeds: a number for each row, its index by default. A row's sample depends on the key,
        its seed and its prefix, and not on the other rows.

    Raises:
      ValueError: sampling without a key, or no token to generate.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not rule.greedy and key is None:
        raise ValueError("sampling (temperature > 0) needs a key: key=jax.random.key(seed)")
    eos_ids = (eos_ids,) if isinstance(eos_ids, int) else tuple(int(i) for i in eos_ids)
    options = (max_new_tokens, eos_ids, pad_id, rule)
    return _generate(decoder, params, prefix, key, row_seeds, options)


@functools.partial(jax.jit, static_argnames=("decoder", "options"))
def _generate(decoder, params, prefix, key, row_seeds, options) -> Generated:
    max_new_tokens, eos_ids, pad_id, rule = options
    logits, state = decoder.prefill(params, prefix, max_new_tokens=max_new_tokens)
    B, V = logits.shape
    row_keys = None
    if not rule.greedy:
        row_seeds = jnp.arange(B) if row_seeds is None else row_seeds
        row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_seeds)

    def choose(i, logits, out, seen):
        """Puts token i into the rows that have not ended."""
        keys = None
        if row_keys is not None:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, i)
        logits = logits.astype(jnp.float32)
        scored = logits
        if seen is not None:
            scored = penalize_repetition(logits, seen, rule.repetition_penalty)
        token = choose_token(scored, rule, keys)
        alive = ~out.finished
        if seen is not None:
            seen = seen | (jax.nn.one_hot(token, V, dtype=bool) & alive[:, None])
        return token, _record(out, i, token, logits, eos_ids, pad_id), seen

    out = Generated(
        tokens=jnp.full((B, max_new_tokens), pad_id, jnp.int32),
        lengths=jnp.zeros((B,), jnp.int32),
        finished=jnp.zeros((B,), bool),
        scores=jnp.zeros((B,), jnp.float32),
    )
    seen = jnp.zeros((B, V), bool) if rule.repetition_penalty != 1 else None
    token, out, seen = choose(0, logits, out, seen)

    def unfinished(carry):
        i, _, out, _, _ = carry
        return (i < max_new_tokens) & ~jnp.all(out.finished)

    def body(carry):
        i, token, out, seen, state = carry
        logits, state = decoder.step(params, state, token)
        token, out, seen = choose(i, logits, out, seen)
        return i + 1, token, out, seen, state

    carry = (jnp.int32(1), token, out, seen, state)
    return jax.lax.while_loop(unfinished, body, carry)[2]


def _record(
    out: Generated,
    i: Int[Array, ""] | int,
    token: Int[Array, " B"],
    logits: Float[Array, "B V"],
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Generated:
    alive = ~out.finished
    picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    log_prob = picked - jax.nn.logsumexp(logits, axis=-1)
    written = jnp.where(alive, token, pad_id)[:, None]
    return Generated(
        tokens=jax.lax.dynamic_update_slice(out.tokens, written, (0, i)),
        lengths=out.lengths + alive,
        finished=out.finished | is_end(token, eos_ids),
        scores=out.scores + jnp.where(alive, log_prob, 0.0),
    )


def is_end(tokens: Int[Array, "..."], eos_ids: tuple[int, ...]) -> Array:
    """Which tokens end a row."""
    end = jnp.zeros(tokens.shape, bool)
    for eos in eos_ids:
        end = end | (tokens == eos)
    return end
