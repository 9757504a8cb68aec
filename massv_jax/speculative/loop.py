"""Decoding in rounds: draft, one pass of the target, accept, roll back.

`start` runs the prompts and emits the first token of every row; `advance` runs rounds until all
rows have ended or a number of rounds is done, so a stream is a sequence of short calls and a whole
answer is one long one. Both are one compiled program each. With max_gamma 0 a round is a step of
plain decoding: there is no other loop.

Both caches hold every token of an answer but the newest, at the start of each round. A round feeds
that token and the drafts; what is not kept is forgotten by setting lengths.
"""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core_jax.decode.target import WindowDecoder
from massv_jax.speculative.accept import (
    StopReason,
    Verdict,
    append_tokens,
    cut_window,
    draw_tokens,
    keep_all,
    verify_choices,
    verify_rejection,
    warp_window,
)
from massv_jax.speculative.counts import RoundCounts
from massv_jax.speculative.drafting import Choice, Drawing, Progress, Proposal, Proposer
from massv_jax.speculative.keys import RowKeys, keys_at, row_keys
from massv_jax.speculative.options import DecodeOptions


class Program(NamedTuple):
    """What is compiled; hashable.

    Attributes:
      decoder: the target.
      proposer: None for plain decoding.
      options: see `DecodeOptions`; max_gamma is 0 exactly if there is no proposer.
    """

    decoder: WindowDecoder
    proposer: Proposer | None
    options: DecodeOptions


class Params(NamedTuple):
    """Parameters of both networks; None for a drafter that has none."""

    target: Any
    drafter: Any = None


@flax.struct.dataclass
class Request:
    """A batch to be answered.

    Attributes:
      prompt: for the target.
      images: for the target's `encode_images`; None without any.
      draft_prompt: for the proposer; None without one.
      key: of the run; None for greedy decoding.
      row_seeds: int32 [B]; a row's draws depend on key, seed and prompt.
      limits: int32 [B], tokens that each row may have, at most max_new_tokens; 0 fills a batch.
    """

    prompt: Any
    images: Any
    draft_prompt: Any
    key: Any
    row_seeds: jax.Array
    limits: jax.Array


@flax.struct.dataclass
class LoopState:
    """Rows between two rounds.

    Attributes:
      target, drafter: states of the decoders.
      tokens: int32 [B, N].
      lengths: int32 [B].
      last: int32 [B], the newest token.
      reason: int32 [B], a `StopReason`.
      limits: int32 [B].
      keys: `RowKeys`; None for greedy decoding.
      counts: `RoundCounts`.
    """

    target: Any
    drafter: Any
    tokens: jax.Array
    lengths: jax.Array
    last: jax.Array
    reason: jax.Array
    limits: jax.Array
    keys: RowKeys | None
    counts: RoundCounts


@functools.partial(jax.jit, static_argnames=("program",))
def start(program: Program, params: Params, request: Request) -> LoopState:
    """Runs the prompts through both networks and emits each row's first token.

    The vision tower runs once; the drafter gets its states.
    """
    o, decoder = program.options, program.decoder
    vision = None
    if request.images is not None:
        vision = decoder.encode_images(params.target, request.images)
    room = {"max_new_tokens": o.max_new_tokens, "window": o.max_gamma}
    logits, target = decoder.begin(params.target, request.prompt, vision, **room)
    drafter = None
    if program.proposer is not None:
        drafter = program.proposer.begin(params.drafter, request.draft_prompt, vision, **room)
    B = logits.shape[0]
    keys = row_keys(request.key, request.row_seeds) if o.samples else None
    zeros = jnp.zeros((B,), jnp.int32)
    token = _own_choices(o, logits[:, None], keys, zeros)[:, 0]
    none = jnp.zeros((B, 0), jnp.int32)
    window = cut_window(
        none, Verdict(zeros, token), room=request.limits, reason=zeros, eos_ids=o.eos_ids,
        pad_id=o.pad_id,
    )  # fmt: skip
    tokens = jnp.full((B, o.max_new_tokens), o.pad_id, jnp.int32)
    return LoopState(
        target=target,
        drafter=drafter,
        tokens=append_tokens(tokens, zeros, window),
        lengths=window.count,
        last=token,
        reason=window.reason,
        limits=request.limits,
        keys=keys,
        counts=RoundCounts.zeros(B, o.max_gamma),
    )


@functools.partial(jax.jit, static_argnames=("program", "gamma"), donate_argnames=("state",))
def advance(
    program: Program,
    params: Params,
    state: LoopState,
    max_rounds: Int[Array, ""],
    *,
    gamma: int,
) -> LoopState:
    """Runs rounds until every row has ended, or `max_rounds` of them.

    Args:
      program: what `start` ran.
      params: of both networks.
      state: from `start` or an earlier call; it is used up.
      max_rounds: int32.
      gamma: drafts of a window, at most max_gamma.
    """

    def unfinished(carry):
        rounds, state = carry
        return (rounds < max_rounds) & jnp.any(state.reason == StopReason.RUNNING)

    def body(carry):
        rounds, state = carry
        return rounds + 1, run_round(program, params, state, gamma)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def run_round(program: Program, params: Params, state: LoopState, gamma: int) -> LoopState:
    """One round of every row that has not ended; the others stay as they are."""
    o, decoder = program.options, program.decoder
    proposal, drafter = make_drafts(program, params, state, gamma)
    window = jnp.concatenate([state.last[:, None], proposal.drafts], axis=1)
    logits, target = decoder.extend(params.target, state.target, window)
    room = state.limits - state.lengths
    # The last possible token is the target's own.
    valid = jnp.clip(room - 1, 0, proposal.valid)
    verdict = judge(o, proposal, logits, valid, state.keys, state.lengths)
    out = cut_window(
        proposal.drafts, verdict, room=room, reason=state.reason, eos_ids=o.eos_ids,
        pad_id=o.pad_id,
    )  # fmt: skip
    if o.max_gamma:  # plain rows advance together; those that have ended need no roll-back
        target = decoder.rewind(target, decoder.ends(state.target) + out.count)
    if program.proposer is not None:
        drafter = program.proposer.rewind(state.drafter, drafter, out.count)
    newest = jnp.maximum(out.count - 1, 0)[:, None]
    newest = jnp.take_along_axis(out.tokens, newest, axis=1)[:, 0]
    return LoopState(
        target=target,
        drafter=drafter,
        tokens=append_tokens(state.tokens, state.lengths, out),
        lengths=state.lengths + out.count,
        last=jnp.where(out.count > 0, newest, state.last),
        reason=out.reason,
        limits=state.limits,
        keys=state.keys,
        counts=state.counts.add(verdict, out, valid),
    )


def make_drafts(
    program: Program, params: Params, state: LoopState, gamma: int
) -> tuple[Proposal, Any]:
    """A window of drafts, and the drafter's state after it."""
    o = program.options
    if program.proposer is None:
        B = state.last.shape[0]
        none = jnp.zeros((B, 0), jnp.int32)
        return Proposal(none, None, jnp.zeros((B,), jnp.int32)), state.drafter
    running = state.reason == StopReason.RUNNING
    progress = Progress(state.tokens, state.lengths, state.last, running)

    def choose(logits: Float[Array, "B U"], i: Int[Array, ""]) -> Choice:
        return _draft_choice(o, logits, state.keys, state.lengths + i)

    drawing = Drawing(choose, o.min_confidence)
    return program.proposer.propose(params.drafter, state.drafter, progress, drawing, gamma)


def judge(
    options: DecodeOptions,
    proposal: Proposal,
    logits: Float[Array, "B T V"],
    valid: Int[Array, " B"],
    keys: RowKeys | None,
    start: Int[Array, " B"],
) -> Verdict:
    """The target's verdict on a window.

    Args:
      options: which rule.
      proposal: gamma drafts.
      logits: the target's, T = gamma + 1.
      valid: drafts that are offered.
      keys: of the rows; None for greedy decoding.
      start: position of the first draft in each row's answer.
    """
    gamma = proposal.drafts.shape[1]
    if not options.needs_probs or gamma == 0:
        choices = _own_choices(options, logits, keys, start)
        if options.accept == "on_policy":
            return keep_all(choices, valid)
        return verify_choices(proposal.drafts, choices, valid)
    assert keys is not None
    probs = jax.nn.softmax(warp_window(logits, options.rule), axis=-1)
    return verify_rejection(proposal.drafts, proposal.probs, probs, valid, keys, start)


def _own_choices(
    options: DecodeOptions,
    logits: Float[Array, "B T V"],
    keys: RowKeys | None,
    start: Int[Array, " B"],
) -> Int[Array, "B T"]:
    """What plain decoding takes in each place."""
    if not options.samples:
        return jnp.argmax(logits.astype(jnp.float32), axis=-1).astype(jnp.int32)
    assert keys is not None
    at = start[:, None] + jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    return draw_tokens(warp_window(logits, options.rule), keys_at(keys.resample, at))


def _draft_choice(
    options: DecodeOptions,
    logits: Float[Array, "B U"],
    keys: RowKeys | None,
    position: Int[Array, " B"],
) -> Choice:
    """A draft by the drafter's logits; padding beyond the target's vocabulary is never drawn."""
    logits = logits[:, : options.vocab_size].astype(jnp.float32)
    confidence = probs = None
    if options.min_confidence > 0:
        confidence = jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)
    if not options.samples:
        return Choice(jnp.argmax(logits, axis=-1).astype(jnp.int32), None, confidence)
    assert keys is not None
    warped = warp_window(logits[:, None], options.rule)[:, 0]
    if options.needs_probs:
        token = draw_tokens(warped, keys_at(keys.draft, position))
        probs = jax.nn.softmax(warped, axis=-1)
    else:
        token = draw_tokens(warped, keys_at(keys.resample, position), vocab=options.vocab_size)
    return Choice(token, probs, confidence)
