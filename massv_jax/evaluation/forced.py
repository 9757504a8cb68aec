"""How far a drafter's distributions are from the target's, on the target's own answers.

Both networks read the same answers; nothing is drafted. In each place sum min(p, q) is the rate at
which a draft would be accepted there, and 1 less it is the total-variation distance (TVD).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from core_jax.decode.sampling import SamplingRule
from core_jax.decode.target import WindowDecoder
from core_jax.gathering import in_turns, own_share
from core_jax.sharding import mesh_of
from massv_jax.distilling_scores import read_answer
from massv_jax.evaluation.acceptance import Measured
from massv_jax.evaluation.prompts import Question
from massv_jax.experiment import DecodingConfig
from massv_jax.speculative.accept import warp_window
from massv_jax.speculative.decoder import Session, SpeculativeDecoder
from massv_jax.speculative.drafting import NetworkProposer

BINS = 20
FIRST = 16  # tokens of an answer's beginning


@dataclasses.dataclass(frozen=True)
class _Both:
    """Target and drafter as one decoder whose logits are a pair."""

    target: WindowDecoder
    proposer: NetworkProposer

    def begin(self, params: Any, prompt: Any, vision: Any, **room: int) -> tuple[Any, Any]:
        p, target = self.target.begin(params[0], prompt[0], vision, **room)
        seen = vision if self.proposer.sees_images else None
        q, drafter = self.proposer.decoder.begin(params[1], prompt[1], seen, **room)
        return (p, q), (target, drafter)

    def extend(self, params: Any, state: Any, tokens: Any) -> tuple[Any, Any]:
        p, target = self.target.extend(params[0], state[0], tokens)
        known = jnp.where(tokens < self.proposer.vocab_size, tokens, 0)
        q, drafter = self.proposer.decoder.extend(params[1], state[1], known)
        return (p, q), (target, drafter)


@dataclasses.dataclass(frozen=True)
class Forced:
    """Comparison in every place of answers; row i is question i's.

    Attributes:
      overlap: float [n, N], sum min(p, q).
      agree: bool [n, N], whether both find the same token most likely.
      counted: bool [n, N], the places that a draft could stand in: not the first token, which the
        prompt's pass gives, and nothing behind an end.
      ends: bool [n, N], where the answer's end token stands.
    """

    overlap: np.ndarray
    agree: np.ndarray
    counted: np.ndarray
    ends: np.ndarray

    def classes(self) -> Mapping[str, np.ndarray]:
        """Places by kind, bool [n, N]."""
        early = np.arange(self.counted.shape[1])[None] < FIRST
        inner = self.counted & ~self.ends
        return {
            "all": self.counted, f"first_{FIRST}": inner & early, "later": inner & ~early,
            "end": self.counted & self.ends,
        }  # fmt: skip

    def histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """Share of places in each bin of TVD, and the bins' edges."""
        tvd = 1 - self.overlap[self.counted]
        counts, edges = np.histogram(np.clip(tvd, 0, 1), bins=BINS, range=(0, 1))
        return counts / max(1, counts.sum()), edges

    def of_question(self, i: int) -> dict[str, float]:
        """For a line of records: the sum of TVD over its places, and how many there are."""
        tvd = 1 - self.overlap[i][self.counted[i]]
        return {"distance": float(tvd.sum()), "places": len(tvd)}

    def rows(self, which: Sequence[int]) -> "Forced":
        """Some of the questions."""
        at = np.asarray(which, int)
        return Forced(self.overlap[at], self.agree[at], self.counted[at], self.ends[at])


def compare_on_answers(
    decoder: SpeculativeDecoder,
    questions: Sequence[Question],
    answers: Measured,
    decoding: DecodingConfig,
    *,
    temperature: float,
    batch_size: int,
) -> Forced | None:
    """Reads answers with both networks; None where the drafter has no distributions.

    Args:
      decoder: with a drafter.
      questions: what was answered.
      answers: the target's.
      decoding: top-k and top-p, which shape p and q as they do in decoding.
      temperature: shapes them as well; 0 leaves them as they are.
      batch_size: rows at a time.
    """
    if decoder.drafter is None or not isinstance(decoder.drafter.proposer, NetworkProposer):
        return None
    rule = SamplingRule()
    if temperature > 0:
        rule = SamplingRule(temperature=temperature, top_k=decoding.top_k, top_p=decoding.top_p)
    decoder = dataclasses.replace(decoder, batch_size=batch_size)
    N = answers.tokens.shape[1]

    def read(first: int) -> list[np.ndarray]:
        batch = questions[first : first + batch_size]
        session = decoder.begin(
            [list(q.images) for q in batch], [q.prompt for q in batch], max_new_tokens=N,
            max_gamma=1,
        )  # fmt: skip
        tokens = answers.tokens[first : first + batch_size]
        tokens = np.pad(tokens, ((0, batch_size - len(batch)), (0, 0)), mode="edge")
        found = _read(session, decoder.drafter.proposer, tokens, rule, _overlap_and_agreement)
        return [np.asarray(x)[: len(batch)] for x in found]

    starts = range(0, len(questions), batch_size)
    parts = in_turns(own_share(starts), len(starts), read)
    overlap, agree = (np.concatenate(x) for x in zip(*parts, strict=True))
    place = np.arange(N)[None]
    counted = (place >= 1) & (place < answers.lengths[:, None])
    is_end = np.isin(answers.tokens, decoder.target.eos_ids)
    return Forced(overlap, agree, counted, is_end & counted)


def _overlap_and_agreement(pair: Any, rule: SamplingRule) -> tuple[Array, Array]:
    """Sum of min(p, q), and whether both find the same token likeliest, in every place."""
    agree = jnp.argmax(pair[0], axis=-1) == jnp.argmax(pair[1][..., : pair[0].shape[-1]], -1)
    p, q = _distributions(pair, rule)
    return jnp.sum(jnp.minimum(p, q), axis=-1), agree


def _distributions(
    pair: Any, rule: SamplingRule
) -> tuple[Float[Array, "B T V"], Float[Array, "B T V"]]:
    """(p, q) over the target's vocabulary; what the drafter does not know has probability 0."""
    p, q = (x.astype(jnp.float32) for x in pair)
    V = p.shape[-1]
    q = q[..., :V]
    p, q = (jax.nn.softmax(warp_window(x, rule), axis=-1) for x in (p, q))
    return p, jnp.pad(q, ((0, 0), (0, 0), (0, V - q.shape[-1])))


def read_distributions(
    decoder: SpeculativeDecoder, question: Question, tokens: np.ndarray, rule: SamplingRule
) -> tuple[np.ndarray, np.ndarray]:
    """(p, q) [N, V] in every place of one answer.

    Args:
      decoder: with a drafter that has distributions.
      question: what was answered.
      tokens: int [N], the answer.
      rule: shapes both.
    """
    session = dataclasses.replace(decoder, batch_size=None).begin(
        [list(question.images)], [question.prompt], max_new_tokens=len(tokens), max_gamma=1
    )
    p, q = _read(session, decoder.drafter.proposer, tokens[None], rule, _distributions)
    return np.asarray(p)[0], np.asarray(q)[0]


def _read(
    session: Session, proposer: NetworkProposer, tokens: np.ndarray, rule: SamplingRule,
    reduce: Callable[[Any, SamplingRule], Any],
) -> Any:  # fmt: skip
    """`reduce` of both networks' logits in every place of a session's answers [B, N]."""
    request, params = session.request, session.params
    both = _Both(session.program.decoder, proposer)
    with mesh_of(params):
        return _program(
            both, (params.target, params.drafter), (request.prompt, request.draft_prompt),
            request.images, jnp.asarray(tokens, jnp.int32), rule, reduce,
        )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("both", "rule", "reduce"))
def _program(
    both: _Both,
    params: Any,
    prompts: Any,
    images: Any,
    tokens: Int[Array, "B N"],
    rule: SamplingRule,
    reduce: Callable[[Any, SamplingRule], Any],
) -> Any:
    vision = None if images is None else both.target.encode_images(params[0], images)
    return read_answer(
        both,  # type: ignore[arg-type]
        params, prompts, vision, tokens, lambda pair: reduce(pair, rule),
    )  # fmt: skip
