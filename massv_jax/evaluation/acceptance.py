"""What speculation does on a set of questions: rounds, tokens and acceptance of every row."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from core_jax.evaluation.bootstrap import (
    Estimate,
    bootstrap_difference,
    bootstrap_quotient,
    bootstrap_ratio,
    ratio,
)
from core_jax.gathering import in_turns, own_share
from massv_jax.evaluation.prompts import Question
from massv_jax.experiment import DecodingConfig
from massv_jax.speculative.counts import Statistics
from massv_jax.speculative.decoder import SpeculativeDecoder


@dataclasses.dataclass(frozen=True)
class Measured:
    """Answers of one arm at one temperature and window, a row a question.

    Attributes:
      tokens: int32 [n, N]; what follows an answer's end is padding.
      lengths: int32 [n].
      statistics: a row each.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    statistics: Statistics

    @classmethod
    def concatenate(cls, parts: Sequence["Measured"]) -> "Measured":
        """The questions of all parts."""
        return cls(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            Statistics.concatenate([part.statistics for part in parts]),
        )

    def rows(self, which: Sequence[int]) -> "Measured":
        """Some of the questions."""
        at = np.asarray(which, int)
        s = self.statistics
        statistics = Statistics(s.rounds[at], s.emitted[at], s.judged[at], s.accepted[at])
        return Measured(self.tokens[at], self.lengths[at], statistics)

    def same_as(self, other: "Measured") -> np.ndarray:
        """Bool [n]: whether answers are the same, token for token."""
        same = (self.tokens == other.tokens) | (
            np.arange(self.tokens.shape[1])[None] >= self.lengths[:, None]
        )
        return same.all(axis=1) & (self.lengths == other.lengths)

    def sums(self) -> np.ndarray:
        """[n, 2]: accepted drafts and rounds."""
        s = self.statistics
        return np.stack([s.accepted.sum(axis=1), s.rounds], axis=1).astype(float)


def measure(
    decoder: SpeculativeDecoder,
    questions: Sequence[Question],
    decoding: DecodingConfig,
    *,
    temperature: float,
    gamma: int,
) -> Measured:
    """Answers questions and counts; processes share the batches.

    Draws are keyed by seed and the question's place, so arms at one temperature share them.

    Args:
      decoder: of an arm; its `batch_size` counts.
      questions: see `Question`.
      decoding: limits, top-k, top-p and seed.
      temperature: 0 is greedy.
      gamma: drafts of a window; not used without a drafter.
    """
    size = decoder.batch_size or len(questions)

    def answer(first: int) -> Measured:
        rows = questions[first : first + size]
        made = decoder.generate(
            [list(q.images) for q in rows], [q.prompt for q in rows],
            max_new_tokens=decoding.max_new_tokens, temperature=temperature, top_k=decoding.top_k,
            top_p=decoding.top_p, gamma=gamma, seed=decoding.seed,
            row_seeds=range(first, first + len(rows)),
        )  # fmt: skip
        return Measured(made.tokens, made.lengths, made.statistics)

    starts = range(0, len(questions), size)
    return Measured.concatenate(in_turns(own_share(starts), len(starts), answer))


def accepted_length(measured: Measured, **options: Any) -> Estimate:
    """Drafts accepted a round, without the target's own token; over questions resampled."""
    return bootstrap_ratio(*measured.sums().T, **options)


def emitted_length(measured: Measured, **options: Any) -> Estimate:
    """Tokens a round, the target's own (the bonus) included."""
    s = measured.statistics
    return bootstrap_ratio(s.emitted, s.rounds, **options)


def acceptance(measured: Measured, **options: Any) -> list[Estimate]:
    """For each place in a window the share of drafts accepted, of those that were compared."""
    s = measured.statistics
    return [
        bootstrap_ratio(s.accepted[:, i], s.judged[:, i], **options)
        for i in range(s.judged.shape[1])
    ]


def times(measured: Measured, base: Measured, **options: Any) -> Estimate:
    """Emitted length over another arm's, on the same questions."""
    ours, theirs = (
        np.stack([m.statistics.emitted, m.statistics.rounds], axis=1) for m in (measured, base)
    )
    return bootstrap_quotient(ours, theirs, **options)


def difference(measured: Measured, base: Measured, **options: Any) -> Estimate:
    """Accepted length less another arm's, on the same questions."""
    return bootstrap_difference(measured.sums(), base.sums(), _accepted, **options)


def _accepted(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[..., 0], sums[..., 1])


Tasks = Mapping[str, Sequence[int]]


def split_tasks(
    questions: Sequence[Question],
    plain: Measured,
    min_tokens: int,
    say: Callable[[str], None] = print,
) -> Tasks:
    """Task -> its questions. Descriptions that the target keeps short are no descriptions.

    Args:
      questions: all.
      plain: the target's greedy answers.
      min_tokens: of a description.
      say: gets a line where some are left out.
    """
    tasks: dict[str, list[int]] = {}
    short = 0
    for i, question in enumerate(questions):
        if question.task == "descriptions" and plain.lengths[i] < min_tokens:
            short += 1
            continue
        tasks.setdefault(question.task, []).append(i)
    if short:
        say(f"{short} descriptions have fewer than {min_tokens} tokens and are left out")
    return tasks
