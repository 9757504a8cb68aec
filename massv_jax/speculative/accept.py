"""Which drafts of a window are kept, what follows them, and where the row stops.

A window of gamma drafts x_1 .. x_gamma was drawn from q_1 .. q_gamma; the target then gives
p_1 .. p_(gamma+1) in one pass. The rule of arXiv 2211.17192 and arXiv 2302.01318 keeps x_i with
probability min(1, p_i(x_i) / q_i(x_i)), and at the first that it does not keep draws from
max(p_i - q_i, 0), normalised; a window kept whole is followed by a draw from p_(gamma+1). What is
emitted then has exactly the distribution p.

Both distributions are after everything that shapes them: `warp_window` is temperature, top-k,
top-p, in this order, for the target and (perhaps with another rule) for the drafter. Temperature
0 is a distribution too: all of it on the most likely token, the first of equals. So greedy rows
need no rule of their own, are exact, and may share a batch with rows that sample; and a drafter
that takes its most likely token has a q of this kind (never its soft q).

How many drafts are offered may depend on what was known before each of them was drawn
(`offered_drafts`), or stop after one that is still offered. To withdraw a draft because of its
own value changes the output's distribution.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from core_jax.decode.generate import is_end
from core_jax.decode.sampling import SamplingRule, cool_logits, warp_logits
from massv_jax.speculative.keys import RowKeys, keys_at, uniforms_at


class Verdict(NamedTuple):
    """What the target made of a window; n+1 tokens can be emitted.

    Attributes:
      accepted: int32 [B], n, the drafts that are kept.
      token: int32 [B], the target's own token that follows them.
    """

    accepted: jax.Array
    token: jax.Array


def warp_window(
    logits: Float[Array, "B T V"],
    rule: SamplingRule,
    temperature: Float[Array, " B"] | None = None,
) -> Float[Array, "B T V"]:
    """The logits of the distributions that are sampled; their softmax is p (or q).

    Args:
      logits: of any float type; the work is done in float32.
      rule: temperature, then top-k, then top-p, as transformers has them.
      temperature: of each row, in place of the rule's; 0 makes a row greedy.

    Returns:
      float32, -inf where a token is excluded. Where a row is greedy everything is excluded but
      the most likely token (the first of equals), so that softmax and any draw are exact.

    Raises:
      ValueError: the rule has a repetition penalty, under which the distribution at a place
        would depend on the drafts before it.
    """
    if rule.repetition_penalty != 1:
        raise ValueError(
            f"repetition_penalty {rule.repetition_penalty} does not go with speculative decoding; "
            "use 1.0, or core_jax.decode.generate"
        )
    logits = logits.astype(jnp.float32)
    if temperature is None and rule.greedy:
        return _only_the_best(logits)
    if temperature is None:
        return _warp(logits, rule)
    greedy = temperature == 0
    divisor = jnp.where(greedy, 1.0, temperature.astype(jnp.float32))
    filters = dataclasses.replace(rule, temperature=1.0)
    warped = _warp(cool_logits(logits, divisor[:, None, None]), filters)
    return jnp.where(greedy[:, None, None], _only_the_best(logits), warped)


def _warp(logits: Float[Array, "B T V"], rule: SamplingRule) -> Float[Array, "B T V"]:
    return jax.vmap(lambda x: warp_logits(x, rule), in_axes=1, out_axes=1)(logits)


def _only_the_best(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    vocabulary = jax.lax.broadcasted_iota(best.dtype, logits.shape, logits.ndim - 1)
    return jnp.where(vocabulary == best, 0.0, -jnp.inf)


def draw_tokens(
    logits: Float[Array, "B *T V"], keys: Key[Array, "B *T"], *, vocab: int | None = None
) -> Int[Array, "B *T"]:
    """Draws from softmax(logits): the largest of the logits with Gumbel noise.

    Args:
      logits: warped, float32; [B, V], or [B, T, V] for a window.
      keys: one for each distribution.
      vocab: how many numbers the noise has. A drafter that is coupled to a target of a wider
        (padded) vocabulary gives the target's here; then both see the same noise. V by default.

    Raises:
      ValueError: `vocab` is smaller than V.
    """
    V = logits.shape[-1]
    vocab = V if vocab is None else vocab
    if vocab < V:
        raise ValueError(f"noise of {vocab} numbers is too short for {V} logits")

    def draw(key: Key[Array, ""]) -> Float[Array, " V"]:
        return jax.random.gumbel(key, (vocab,), jnp.float32)[:V]

    for _ in range(keys.ndim):
        draw = jax.vmap(draw)
    return jnp.argmax(logits + draw(keys), axis=-1).astype(jnp.int32)


def offered_drafts(
    confidence: Float[Array, "B gamma"], threshold: float | Float[Array, ""]
) -> Int[Array, " B"]:
    """How many drafts to offer if drafting stops where the drafter is unsure.

    Args:
      confidence: float [B, gamma], of q_i before x_i was drawn, such as its largest probability
        (before top-k and top-p). It must not know x_i itself: that would not be lossless.
      threshold: draft i is the last not to be offered if its confidence is below.

    Returns:
      `valid` for the functions below.
    """
    return _leading(confidence >= threshold)


def verify_rejection(
    drafts: Int[Array, "B gamma"],
    drafter_probs: Float[Array, "B gamma U"] | None,
    target_probs: Float[Array, "B gamma+1 V"],
    valid: Int[Array, " B"],
    keys: RowKeys,
    start: Int[Array, " B"],
) -> Verdict:
    """The standard rule: what is emitted has the distribution `target_probs`.

    Args:
      drafts: what the drafter proposes; gamma may be 0.
      drafter_probs: q, from which the drafts were drawn; None stands for drafts that were not
        drawn at all (prompt lookup). Vocabularies that differ in their padding count as zero
        where one is shorter; the probability of the other is left there.
      target_probs: p. Both are after temperature, top-k and top-p.
      valid: the drafts of each row that are offered, 0 to gamma; the others do not matter.
      keys: of the rows.
      start: the position of x_1 in each row's answer.
    """
    positions = start[:, None] + jnp.arange(drafts.shape[1], dtype=start.dtype)[None]
    uniforms = uniforms_at(keys.accept, positions)
    accepted = count_accepted(drafts, drafter_probs, target_probs, valid, uniforms)
    probs = next_token_probs(drafts, drafter_probs, target_probs, valid, accepted)
    token = draw_tokens(jnp.log(probs), keys_at(keys.resample, start + accepted))
    return Verdict(accepted, token)


def verify_choices(
    drafts: Int[Array, "B gamma"], choices: Int[Array, "B gamma+1"], valid: Int[Array, " B"]
) -> Verdict:
    """Keeps the drafts that equal what the target chooses in their place.

    The emitted tokens are the target's choices whatever the drafts are. If `draw_tokens` makes
    the choices and the drafts with the same keys, the RESAMPLE keys of their positions, they
    often agree: Gumbel coupling (arXiv 2408.07978). With gamma 0 this is plain decoding.

    Args:
      drafts: what the drafter proposes.
      choices: int32, what the target takes after each prefix of the drafts.
      valid: the drafts of each row that are offered.
    """
    gamma = drafts.shape[1]
    accepted = _leading((drafts == choices[:, :gamma]) & _offered(valid, gamma))
    token = jnp.take_along_axis(choices, accepted[:, None], axis=1)[:, 0]
    return Verdict(accepted, token.astype(jnp.int32))


def keep_all(choices: Int[Array, "B gamma+1"], valid: Int[Array, " B"]) -> Verdict:
    """Keeps every draft, whatever the target thinks of it; its own token follows. Not lossless.

    Args:
      choices: int32, what the target takes after each prefix of the drafts.
      valid: the drafts of each row that are offered.
    """
    token = jnp.take_along_axis(choices, valid[:, None], axis=1)[:, 0]
    return Verdict(valid.astype(jnp.int32), token.astype(jnp.int32))


def count_accepted(
    drafts: Int[Array, "B gamma"],
    drafter_probs: Float[Array, "B gamma U"] | None,
    target_probs: Float[Array, "B gamma+1 V"],
    valid: Int[Array, " B"],
    uniforms: Float[Array, "B gamma"],
) -> Int[Array, " B"]:
    """How many drafts are kept: those before the first with u q(x) >= p(x).

    A draft with q(x) = 0 cannot have been drawn and is not kept; one outside of the target's
    vocabulary has p(x) = 0. Arguments are those of `verify_rejection`.

    Args:
      drafts: see there.
      drafter_probs: see there.
      target_probs: see there.
      valid: see there.
      uniforms: float32 in [0, 1).
    """
    gamma = drafts.shape[1]
    p = _prob_of(drafts, target_probs[:, :gamma].astype(jnp.float32))
    q = jnp.ones(p.shape, jnp.float32)
    if drafter_probs is not None:
        q = _prob_of(drafts, drafter_probs.astype(jnp.float32))
    # No division: u q < p is the same test without an infinite ratio, and u < 1 keeps p = q.
    keep = (uniforms * q < p) & (q > 0)
    return _leading(keep & _offered(valid, gamma))


def next_token_probs(
    drafts: Int[Array, "B gamma"],
    drafter_probs: Float[Array, "B gamma U"] | None,
    target_probs: Float[Array, "B gamma+1 V"],
    valid: Int[Array, " B"],
    accepted: Int[Array, " B"],
) -> Float[Array, "B V"]:
    """The distribution of the token after the drafts that were kept, in float32.

    The residual where a draft was refused, p itself where every offered draft was kept. Where
    rounding leaves no residual (p = q, and a draft refused all the same) it is p, never NaN.
    """
    gamma = drafts.shape[1]
    p = target_probs.astype(jnp.float32)
    V = p.shape[-1]
    p = jnp.take_along_axis(p, accepted[:, None, None], axis=1)[:, 0]
    if not gamma:
        return p
    refused = jnp.minimum(accepted, gamma - 1)[:, None]
    if drafter_probs is None:
        draft = jnp.take_along_axis(drafts, refused, axis=1)
        q = (draft == jnp.arange(V, dtype=draft.dtype)[None]).astype(jnp.float32)
    else:
        q = jnp.take_along_axis(drafter_probs.astype(jnp.float32), refused[:, :, None], axis=1)
        q = q[:, 0, :V]
        q = jnp.pad(q, ((0, 0), (0, V - q.shape[1])))
    residual = jnp.maximum(p - q, 0.0)
    total = jnp.sum(residual, axis=-1, keepdims=True)
    # A sum below the normal numbers would be flushed to zero somewhere on the way.
    some = total > jnp.finfo(jnp.float32).tiny
    residual = residual / jnp.where(some, total, 1.0)
    return jnp.where(some & (accepted < valid)[:, None], residual, p)


def _prob_of(tokens: Int[Array, "B T"], probs: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    """The tokens' probabilities; 0 for what is no token of this vocabulary."""
    picked = jnp.take_along_axis(
        probs, jnp.maximum(tokens, 0)[..., None], axis=-1, mode="fill", fill_value=0.0
    )
    return jnp.where(tokens >= 0, picked[..., 0], 0.0)


def _offered(valid: Int[Array, " B"], gamma: int) -> Bool[Array, "B gamma"]:
    return jnp.arange(gamma, dtype=valid.dtype)[None] < valid[:, None]


def _leading(keep: Bool[Array, "B T"]) -> Int[Array, " B"]:
    """How many values of a row are True before the first that is not."""
    return jnp.sum(jnp.cumprod(keep.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


class StopReason(enum.IntEnum):
    """Why a row emits nothing more."""

    RUNNING = 0
    END_TOKEN = 1
    LENGTH = 2


class Window(NamedTuple):
    """What a round emits.

    Attributes:
      tokens: int32 [B, gamma+1], `pad_id` from `count` on.
      count: int32 [B], tokens emitted; 0 for rows that had stopped before.
      reason: int32 [B], a `StopReason`, after these tokens.
    """

    tokens: jax.Array
    count: jax.Array
    reason: jax.Array


def cut_window(
    drafts: Int[Array, "B gamma"],
    verdict: Verdict,
    *,
    room: Int[Array, " B"],
    reason: Int[Array, " B"],
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
) -> Window:
    """The tokens of a round up to an end token or to the last for which there is room.

    Args:
      drafts: of the round.
      verdict: how many of them are kept, and the token that follows.
      room: tokens that each row may still emit.
      reason: a `StopReason` for each row before the round; stopped rows stay as they are.
      eos_ids: end tokens; the first one is emitted, what follows is not. A row whose last token
        of all is an end token stopped at END_TOKEN.
      pad_id: what fills the rest.
    """
    gamma = drafts.shape[1]
    place = jnp.arange(gamma + 1, dtype=jnp.int32)[None]
    token = verdict.token[:, None]
    padded = jnp.concatenate([drafts.astype(jnp.int32), token], axis=1)
    tokens = jnp.where(place == verdict.accepted[:, None], token, padded)
    count = jnp.minimum(verdict.accepted + 1, room)
    count = jnp.where(reason == StopReason.RUNNING, jnp.maximum(count, 0), 0)
    end = is_end(tokens, tuple(eos_ids)) & (place < count[:, None])
    ended = jnp.any(end, axis=1)
    count = jnp.where(ended, jnp.argmax(end, axis=1).astype(jnp.int32) + 1, count)
    stop = jnp.where(count >= room, StopReason.LENGTH, StopReason.RUNNING)
    stop = jnp.where(ended, StopReason.END_TOKEN, stop)
    reason = jnp.where(reason == StopReason.RUNNING, stop, reason).astype(jnp.int32)
    tokens = jnp.where(place < count[:, None], tokens, pad_id)
    return Window(tokens, count.astype(jnp.int32), reason)


def append_tokens(
    written: Int[Array, "B N"], lengths: Int[Array, " B"], window: Window
) -> Int[Array, "B N"]:
    """Writes each row's `count` tokens at its `lengths`; nothing else changes.

    A write past N is dropped, never moved back onto earlier tokens.
    """
    B, T = window.tokens.shape
    place = jnp.arange(T, dtype=jnp.int32)[None]
    outside = written.shape[1]
    at = jnp.where(place < window.count[:, None], lengths[:, None] + place, outside)
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    return written.at[rows, at].set(window.tokens.astype(written.dtype), mode="drop")
