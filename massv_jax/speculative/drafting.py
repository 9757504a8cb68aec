"""Where drafts come from: a network, or the prompt itself.

A proposer is hashable and holds no arrays; parameters and states are pytrees.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from core_jax.decode.target import WindowDecoder

State = Any


class Progress(NamedTuple):
    """Where the rows are.

    Attributes:
      tokens: int32 [B, N], the answers so far.
      lengths: int32 [B], their tokens.
      last: int32 [B], the newest token of each.
      running: bool [B], rows that have not ended.
    """

    tokens: jax.Array
    lengths: jax.Array
    last: jax.Array
    running: jax.Array


class Choice(NamedTuple):
    """One draft of every row.

    Attributes:
      token: int32 [B].
      probs: float32 [B, U], the distribution that it was drawn from; None if nobody asks.
      confidence: float32 [B], the largest probability before the token was drawn; None likewise.
    """

    token: jax.Array
    probs: jax.Array | None
    confidence: jax.Array | None


class Drawing(NamedTuple):
    """How drafts are drawn.

    Attributes:
      choose: (logits [B, V], i) -> `Choice` of draft i + 1.
      min_confidence: see `DecodeOptions`.
    """

    choose: Callable[[Array, Any], Choice]
    min_confidence: float


class Proposal(NamedTuple):
    """A window.

    Attributes:
      drafts: int32 [B, gamma].
      probs: float32 [B, gamma, U], what they were drawn from; None if they were not drawn.
      valid: int32 [B], how many of them are offered.
    """

    drafts: jax.Array
    probs: jax.Array | None
    valid: jax.Array


class Proposer(Protocol):
    """Anything that makes drafts."""

    def begin(
        self, params: Any, prompt: Any, vision: Any, *, max_new_tokens: int, window: int
    ) -> State:
        """Reads the prompt; arguments are `WindowDecoder.begin`'s."""
        ...

    def propose(
        self, params: Any, state: State, progress: Progress, drawing: Drawing, gamma: int
    ) -> tuple[Proposal, State]:
        """At most gamma drafts a row, and a state that knows them all."""
        ...

    def rewind(self, before: State, after: State, count: Int[Array, " B"]) -> State:
        """The state after a round that emitted `count` tokens a row.

        Args:
          before: from which `propose` started.
          after: what it returned.
          count: tokens emitted; 0 for rows that had ended.
        """
        ...


@dataclasses.dataclass(frozen=True)
class NetworkProposer:
    """A network drafts token by token.

    Attributes:
      decoder: the network.
      vocab_size: its logits; tokens beyond them (of a target that is padded further) are read as
        token 0.
      sees_images: whether it gets the states of the target's tower.
    """

    decoder: WindowDecoder
    vocab_size: int
    sees_images: bool = True

    def begin(
        self, params: Any, prompt: Any, vision: Any, *, max_new_tokens: int, window: int
    ) -> State:
        """See `Proposer`."""
        vision = vision if self.sees_images else None
        _, state = self.decoder.begin(
            params, prompt, vision, max_new_tokens=max_new_tokens, window=window
        )
        return state

    def propose(
        self, params: Any, state: State, progress: Progress, drawing: Drawing, gamma: int
    ) -> tuple[Proposal, State]:
        """See `Proposer`.

        The last draft is fed as well, though nobody asks what follows it (and no output head is
        computed): after a window that is accepted whole the next round starts behind it.
        """
        B = progress.last.shape[0]

        def feed(token, state):
            token = jnp.where(token < self.vocab_size, token, 0)
            logits, state = self.decoder.extend(params, state, token[:, None])
            return logits[:, 0], state

        def choose(i, token, state):
            logits, state = feed(token, state)
            return drawing.choose(logits, i), state

        if gamma == 0:
            _, state = feed(progress.last, state)
            none = jnp.zeros((B, 0), jnp.int32)
            return Proposal(none, None, jnp.zeros((B,), jnp.int32)), state
        choice, _ = jax.eval_shape(choose, jnp.int32(0), progress.last, state)
        probs = None
        if choice.probs is not None:
            probs = jnp.zeros((B, gamma, choice.probs.shape[-1]), jnp.float32)
        valid = jnp.zeros((B,), jnp.int32)
        drafts = jnp.zeros((B, gamma), jnp.int32)
        carry = (jnp.int32(0), progress.last, state, drafts, probs, valid, progress.running)

        def goes_on(carry):
            return (carry[0] < gamma) & jnp.any(carry[-1])

        def body(carry):
            i, token, state, drafts, probs, valid, drafting = carry
            choice, state = choose(i, token, state)
            drafts = jax.lax.dynamic_update_index_in_dim(drafts, choice.token, i, axis=1)
            if probs is not None:
                assert choice.probs is not None
                probs = jax.lax.dynamic_update_index_in_dim(probs, choice.probs, i, axis=1)
            valid = valid + drafting
            if drawing.min_confidence > 0:
                assert choice.confidence is not None
                drafting = drafting & (choice.confidence >= drawing.min_confidence)
            return i + 1, choice.token, state, drafts, probs, valid, drafting

        carry = jax.lax.while_loop(goes_on, body, carry)
        _, token, state, drafts, probs, valid, _ = carry
        _, state = feed(token, state)
        return Proposal(drafts, probs, valid), state

    def rewind(self, before: State, after: State, count: Int[Array, " B"]) -> State:
        """See `Proposer`."""
        return self.decoder.rewind(after, self.decoder.ends(before) + count)


@flax.struct.dataclass
class LookupPrompt:
    """Tokens to look drafts up in.

    Attributes:
      ids: int32 [B, P], padded on the right.
      lengths: int32 [B].
    """

    ids: jax.Array
    lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class LookupProposer:
    """Prompt lookup: what followed the last time that the newest tokens stood somewhere.

    The longest of the n-grams that end the text so far and occurred before decides; of several
    places the latest. Rows without a match offer nothing.

    Attributes:
      max_ngram: longest n-gram.
      min_ngram: shortest.
    """

    max_ngram: int = 3
    min_ngram: int = 1

    def begin(
        self, params: Any, prompt: LookupPrompt, vision: Any, *, max_new_tokens: int, window: int
    ) -> LookupPrompt:
        """See `Proposer`."""
        del params, vision, max_new_tokens, window
        return prompt

    def propose(
        self, params: Any, state: LookupPrompt, progress: Progress, drawing: Drawing, gamma: int
    ) -> tuple[Proposal, LookupPrompt]:
        """See `Proposer`."""
        del params, drawing
        text, length = _join(state, progress, gamma)
        start, found = _latest_match(text, length, self.min_ngram, self.max_ngram)
        at = start[:, None] + jnp.arange(gamma, dtype=jnp.int32)[None]
        drafts = jnp.take_along_axis(text, at, axis=1, mode="clip")
        valid = jnp.where(found & progress.running, jnp.minimum(length - start, gamma), 0)
        return Proposal(drafts, None, valid.astype(jnp.int32)), state

    def rewind(
        self, before: LookupPrompt, after: LookupPrompt, count: Int[Array, " B"]
    ) -> LookupPrompt:
        """See `Proposer`."""
        del before, count
        return after


def _join(
    prompt: LookupPrompt, progress: Progress, gamma: int
) -> tuple[Int[Array, "B S"], Int[Array, " B"]]:
    """Prompt and answer without a gap, and their length together."""
    B, N = progress.tokens.shape
    place = jnp.arange(N, dtype=jnp.int32)[None]
    text = jnp.pad(prompt.ids, ((0, 0), (0, N + gamma)))
    at = jnp.where(place < progress.lengths[:, None], prompt.lengths[:, None] + place, -1)
    at = jnp.where(at < 0, text.shape[1], at)
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    text = text.at[rows, at].set(progress.tokens, mode="drop")
    return text, prompt.lengths + progress.lengths


def _latest_match(
    text: Int[Array, "B S"], length: Int[Array, " B"], shortest: int, longest: int
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Where to go on reading, and whether there is such a place."""
    S = text.shape[1]
    start = jnp.zeros(length.shape, jnp.int32)
    found = jnp.zeros(length.shape, bool)
    place = jnp.arange(S, dtype=jnp.int32)[None]
    same = jnp.ones(text.shape, bool)  # the n tokens before a place are the newest n
    for n in range(1, longest + 1):
        newest = jnp.take_along_axis(text, jnp.maximum(length - n, 0)[:, None], axis=1)
        same = same & (jnp.roll(text, n, axis=1) == newest)
        if n < shortest:
            continue
        usable = same & (place >= n) & (place < length[:, None])
        here = jnp.max(jnp.where(usable, place, -1), axis=1)
        start = jnp.where(here >= 0, here, start)
        found = found | (here >= 0)
    return start, found
