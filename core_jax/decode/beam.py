"""Beam search, step for step what transformers' `_beam_search` does (v5), as one program.

Each prompt has M running beams and the M best ended hypotheses. A step looks at the best
M * max(2, 1 + number of end tokens) continuations, so that M of them are sure not to end; those
among the first M that end compete, length-penalised, with the ended ones.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.decode.generate import Decoder, Generated, Prefix, is_end

_NEVER = -1.0e9  # transformers' score of what must not be chosen; sums with it stay finite

EarlyStopping = bool | Literal["never"]


@flax.struct.dataclass
class _Beams:
    """Hypotheses of B prompts, best first."""

    tokens: jax.Array  # [B, M, N]
    lengths: jax.Array  # [B, M]
    scores: jax.Array  # [B, M]


@flax.struct.dataclass
class _Search:
    running: _Beams  # scores are summed log probabilities
    ended: _Beams  # scores are length-penalised
    has_ended: jax.Array  # [B, M] whether the slot of `ended` is taken
    improvable: jax.Array  # [B, 1]
    parents: jax.Array  # [B * M] the row each running beam continues
    blocked: jax.Array  # [] whether no candidate can go on


def beam_search(
    decoder: Decoder,
    params: Any,
    prefix: Prefix,
    *,
    max_new_tokens: int,
    eos_ids: int | Sequence[int] = (),
    pad_id: int = 0,
    num_beams: int = 4,
    early_stopping: EarlyStopping = False,
    length_penalty: float = 1.0,
) -> Generated:
    """The best hypothesis of each prompt.

    Args:
      decoder: the network.
      params: its parameters.
      prefix: what the decoder's `prefill` takes.
      max_new_tokens: N.
      eos_ids: tokens that end a hypothesis.
      pad_id: what fills a row after its end.
      num_beams: M.
      early_stopping: True stops when M hypotheses have ended; False when a running beam, at its
        present length, is no longer better than the worst of them; "never" when none can become
        better.
      length_penalty: scores are divided by length ** length_penalty, so positive values favour
        long hypotheses.

    Returns:
      One row a prompt; `scores` are length-penalised.

    Raises:
      ValueError: an option is out of range.
    """
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping is {early_stopping!r}; True, False or 'never'")
    if num_beams < 1 or max_new_tokens < 1:
        raise ValueError(f"num_beams {num_beams} and max_new_tokens {max_new_tokens}: at least 1")
    eos_ids = (eos_ids,) if isinstance(eos_ids, int) else tuple(int(i) for i in eos_ids)
    options = (max_new_tokens, eos_ids, pad_id, num_beams, early_stopping, float(length_penalty))
    return _beam_search(decoder, params, prefix, options)


@functools.partial(jax.jit, static_argnames=("decoder", "options"))
def _beam_search(decoder: Decoder, params: Any, prefix: Prefix, options) -> Generated:
    N, eos_ids, pad_id, M = options[:4]
    logits, state = decoder.prefill(params, prefix, max_new_tokens=N)
    B, V = logits.shape
    keep = max(2, 1 + len(eos_ids)) * M
    if keep > V * M:
        raise ValueError(f"{keep} continuations are wanted, {M} beams of {V} tokens have fewer")
    state = decoder.repeat(state, M)
    logits = jnp.repeat(logits, M, axis=0)
    search = _advance(0, _initial(B, M, N, pad_id), logits, options)

    def unfinished(carry):
        i, search, _ = carry
        return (i < N) & _goes_on(search, options)

    def body(carry):
        i, search, state = carry
        state = decoder.reorder(state, search.parents)
        last = jax.lax.dynamic_index_in_dim(search.running.tokens, i - 1, axis=2, keepdims=False)
        logits, state = decoder.step(params, state, last.reshape(-1))
        return i + 1, _advance(i, search, logits, options), state

    _, search, _ = jax.lax.while_loop(unfinished, body, (jnp.int32(1), search, state))
    best = jax.tree.map(lambda x: x[:, 0], search.ended)
    final = jnp.take_along_axis(best.tokens, jnp.maximum(best.lengths - 1, 0)[:, None], axis=1)
    return Generated(
        tokens=best.tokens,
        lengths=best.lengths,
        finished=is_end(final[:, 0], eos_ids) & (best.lengths > 0),
        scores=best.scores,
    )


def _initial(B: int, M: int, N: int, pad_id: int) -> _Search:
    beams = _Beams(
        tokens=jnp.full((B, M, N), pad_id, jnp.int32),
        lengths=jnp.zeros((B, M), jnp.int32),
        scores=jnp.full((B, M), _NEVER, jnp.float32),
    )
    # All beams begin equal, so only the first counts.
    first = jnp.zeros((B, M), jnp.float32).at[:, 1:].set(_NEVER)
    return _Search(
        running=dataclasses.replace(beams, scores=first),
        ended=beams,
        has_ended=jnp.zeros((B, M), bool),
        improvable=jnp.ones((B, 1), bool),
        parents=jnp.arange(B * M, dtype=jnp.int32),
        blocked=jnp.zeros((), bool),
    )


def _advance(i: Int[Array, ""] | int, search: _Search, logits: Array, options) -> _Search:
    """Adds token i (there are i tokens so far) to every running beam."""
    N, eos_ids, _, M, early_stopping, length_penalty = options
    B, V = logits.shape[0] // M, logits.shape[1]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1).reshape(B, M, V)
    total = (log_probs + search.running.scores[:, :, None]).reshape(B, M * V)
    scores, flat = jax.lax.top_k(total, max(2, 1 + len(eos_ids)) * M)
    parents, token = flat // V, (flat % V).astype(jnp.int32)
    candidates = _gather(search.running, parents).replace(scores=scores)
    candidates = candidates.replace(
        tokens=jax.lax.dynamic_update_slice_in_dim(candidates.tokens, token[:, :, None], i, axis=2),
        lengths=candidates.lengths + 1,
    )
    ends = is_end(token, eos_ids) | (i + 1 >= N)

    open_scores = scores + ends.astype(jnp.float32) * _NEVER
    chosen = jax.lax.top_k(open_scores, M)[1]
    running = _gather(candidates.replace(scores=open_scores), chosen)
    rows = jnp.take_along_axis(parents, chosen, axis=1) + M * jnp.arange(B)[:, None]

    ended, has_ended = _merge_ended(i, search, candidates, ends, options)
    # The best score that the first running beam may still reach, against the worst ended one.
    limit = N if early_stopping == "never" and length_penalty > 0 else i + 1
    hope = running.scores[:, :1] / jnp.float32(limit) ** length_penalty
    worst = jnp.where(has_ended, jnp.min(ended.scores, axis=1, keepdims=True), _NEVER)
    return _Search(
        running=running,
        ended=ended,
        has_ended=has_ended,
        improvable=search.improvable & jnp.any(hope > worst, axis=1, keepdims=True),
        parents=rows.reshape(-1).astype(jnp.int32),
        blocked=jnp.all(ends),
    )


def _merge_ended(
    i: Int[Array, ""] | int, search: _Search, candidates: _Beams, ends: Bool[Array, "B C"], options
) -> tuple[_Beams, Bool[Array, "B M"]]:
    """The M best ended hypotheses, old and new."""
    M, early_stopping, length_penalty = options[3:]
    # Only the first M candidates may end; the others are there to keep M beams running.
    just_ended = ends & (jnp.arange(ends.shape[1]) < M)[None]
    scores = candidates.scores / jnp.float32(i + 1) ** length_penalty
    if early_stopping is True:
        full = jnp.all(search.has_ended, axis=1, keepdims=True)
        scores = scores + full.astype(jnp.float32) * _NEVER
    scores = scores + (~search.improvable).astype(jnp.float32) * _NEVER
    scores = scores + (~just_ended).astype(jnp.float32) * _NEVER
    both = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new], axis=1),
        (search.ended, search.has_ended),
        (dataclasses.replace(candidates, scores=scores), just_ended),
    )
    return _gather(both, jax.lax.top_k(both[0].scores, M)[1])


def _goes_on(search: _Search, options) -> Bool[Array, ""]:
    go_on = jnp.any(search.improvable) & ~search.blocked
    if options[4] is True:
        go_on = go_on & ~jnp.all(search.has_ended)
    return go_on


def _gather(beams: Any, idx: Int[Array, "B C"]) -> Any:
    """Picks beams of each prompt."""

    def one(x: Float[Array, "B M ..."]) -> Array:
        return jnp.take_along_axis(x, idx.reshape(idx.shape + (1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(one, beams)
