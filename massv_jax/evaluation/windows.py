"""The target's logits of a verified window beside those of plain steps, in the same places.

In exact arithmetic they are equal. What they differ by is what rounding may do to a near-tie; a
difference beyond it is an error in a cache, a mask or a position.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from core_jax.decode.target import WindowDecoder
from core_jax.gathering import in_turns, own_share
from core_jax.sharding import mesh_of
from massv_jax.distilling_scores import read_answer
from massv_jax.evaluation.acceptance import Measured
from massv_jax.evaluation.prompts import Question
from massv_jax.experiment import DecodingConfig
from massv_jax.speculative.decoder import SpeculativeDecoder

KEPT = 8  # most likely tokens of a step whose logits are kept


@dataclasses.dataclass(frozen=True)
class _Twice:
    """A network that reads each window at once, and token by token."""

    decoder: WindowDecoder

    def begin(
        self, params: Any, prompt: Any, vision: Any, *, max_new_tokens: int, window: int
    ) -> tuple[Any, Any]:
        at_once = self.decoder.begin(
            params, prompt, vision, max_new_tokens=max_new_tokens, window=window
        )
        steps = self.decoder.begin(params, prompt, vision, max_new_tokens=max_new_tokens, window=0)
        return (at_once[0], steps[0]), (at_once[1], steps[1])

    def extend(self, params: Any, state: Any, tokens: Any) -> tuple[Any, Any]:
        at_once, first = self.decoder.extend(params, state[0], tokens)

        def step(state: Any, token: Any) -> Any:
            logits, state = self.decoder.extend(params, state, token[:, None])
            return state, logits[:, 0]

        second, steps = jax.lax.scan(step, state[1], tokens.T)
        return (at_once, jnp.moveaxis(steps, 0, 1)), (first, second)


@dataclasses.dataclass(frozen=True)
class WindowLogits:
    """Comparison in every place of answers.

    Attributes:
      difference: float [n, N], the largest between a window's logits and a step's.
      scale: float [n, N], the largest absolute logit of the step.
      flipped: bool [n, N], the most likely token is another.
      ids, values: [n, N, 8], the step's most likely tokens and their logits.
      counted: bool [n, N], places of the answers.
    """

    difference: np.ndarray
    scale: np.ndarray
    flipped: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    counted: np.ndarray

    @property
    def largest(self) -> float:
        """The largest difference anywhere."""
        return float(self.difference[self.counted].max())

    def gap(self, row: int, place: int, token: int) -> float:
        """By how much a token is less likely than the most likely one, as logits."""
        found = np.flatnonzero(self.ids[row, place] == token)
        values = self.values[row, place]
        # One that is not among the kept ones is at least as far as the last of them.
        return float(values[0] - values[found[0] if len(found) else -1])


def compare_windows(
    decoder: SpeculativeDecoder,
    questions: Sequence[Question],
    answers: Measured,
    decoding: DecodingConfig,
    *,
    gamma: int,
) -> WindowLogits:
    """Reads the target's answers in windows of gamma + 1 tokens, and token by token.

    Args:
      decoder: the target's, without a drafter.
      questions: what was answered.
      answers: the target's.
      decoding: its `batch_size` counts.
      gamma: drafts of a window.
    """
    size = decoding.batch_size

    def compare(first: int) -> list[np.ndarray]:
        batch = questions[first : first + size]
        tokens = answers.tokens[first : first + size]
        session = dataclasses.replace(decoder, batch_size=size).begin(
            [list(q.images) for q in batch], [q.prompt for q in batch],
            max_new_tokens=tokens.shape[1],
        )  # fmt: skip
        tokens = np.pad(tokens, ((0, size - len(batch)), (0, 0)), mode="edge")
        with mesh_of(session.params):
            found = _compare(
                session.program.decoder, session.params.target, session.request.prompt,
                session.request.images, jnp.asarray(tokens, jnp.int32), gamma + 1,
            )  # fmt: skip
        return [np.asarray(x)[: len(batch)] for x in found]

    starts = range(0, len(questions), size)
    parts = in_turns(own_share(starts), len(starts), compare)
    place = np.arange(answers.tokens.shape[1])[None]
    difference, scale, flipped, ids, values = map(np.concatenate, zip(*parts, strict=True))
    return WindowLogits(difference, scale, flipped, ids, values, place < answers.lengths[:, None])


@functools.partial(jax.jit, static_argnames=("decoder", "piece"))
def _compare(
    decoder: WindowDecoder,
    params: Any,
    prompt: Any,
    images: Any,
    tokens: Int[Array, "B N"],
    piece: int,
) -> Any:
    vision = None if images is None else decoder.encode_images(params, images)

    def reduce(pair: Any) -> Any:
        window, step = (x.astype(jnp.float32) for x in pair)
        difference = jnp.max(jnp.abs(window - step), axis=-1)
        flipped = jnp.argmax(window, axis=-1) != jnp.argmax(step, axis=-1)
        values, ids = jax.lax.top_k(step, min(KEPT, step.shape[-1]))
        return difference, jnp.max(jnp.abs(step), axis=-1), flipped, ids, values

    return read_answer(_Twice(decoder), params, prompt, vision, tokens, reduce, piece=piece)  # type: ignore[arg-type]
