"""How many drafts a window has: fixed, chosen while decoding, or as an earlier run chose.

The host chooses between calls, from what earlier windows showed. So a choice knows nothing of the
drafts that it is made for, and the output keeps its distribution; but a row's sampled text then
depends on what its neighbours did. Every choice is logged, and a log can be run again.
"""

import dataclasses
import math
import numbers
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from massv_jax.speculative.counts import Statistics

ALL = 2**31 - 1


class GammaChoice(NamedTuple):
    """A call: so many rounds of windows of gamma drafts."""

    gamma: int
    rounds: int


class GammaPolicy(Protocol):
    """Chooses windows."""

    @property
    def max_gamma(self) -> int:
        """The longest."""
        ...

    def run(self, session: Any, *, batch: int) -> tuple[GammaChoice, ...]:
        """Answers a `Session` to its end; `batch` counts the sessions of a job."""
        ...


@dataclasses.dataclass(frozen=True)
class FixedGamma:
    """Always the same.

    Attributes:
      gamma: drafts of a window.
    """

    gamma: int

    @property
    def max_gamma(self) -> int:
        """See `GammaPolicy`."""
        return self.gamma

    def run(self, session: Any, *, batch: int) -> tuple[GammaChoice, ...]:
        """See `GammaPolicy`."""
        del batch
        session.advance(self.gamma)
        return (GammaChoice(self.gamma, ALL),)


@dataclasses.dataclass(frozen=True)
class Replay:
    """What an earlier run chose.

    Attributes:
      choices: of each batch, from `Answers.choices`.
      room: `Answers.max_gamma` of that run, which may never have chosen its longest window: caches
        then have the same sizes. 0: room for the longest that was chosen.
    """

    choices: tuple[tuple[GammaChoice, ...], ...]
    room: int = 0

    @property
    def max_gamma(self) -> int:
        """See `GammaPolicy`."""
        chosen = max((c.gamma for calls in self.choices for c in calls), default=1)
        return max(chosen, self.room)

    def run(self, session: Any, *, batch: int) -> tuple[GammaChoice, ...]:
        """See `GammaPolicy`.

        Raises:
          ValueError: the log is too short for this job.
        """
        if batch < len(self.choices):
            for choice in self.choices[batch]:
                session.advance(choice.gamma, choice.rounds)
        if batch >= len(self.choices) or not session.done:
            raise ValueError(
                f"the logged choices end before batch {batch} does; they are of another run"
            )
        return self.choices[batch]


@dataclasses.dataclass
class AdaptiveGamma:
    """Takes what promises the most tokens a second, from measured acceptance and cost.

    Expected tokens of a round are 1 + a_1 + a_1 a_2 + ..., with a_i the share of drafts at place i
    that were accepted once they were compared; a place that was never reached is taken to be like
    the last one that was. The seconds of a round are measured for each gamma that was tried, and a
    line in gamma through them stands for the others.

    Attributes:
      gammas: what may be chosen; each is a program to compile.
      rounds_per_call: rounds between two choices.
      memory: share of the past that a call leaves standing in the averages.
      seconds: of a round by gamma, to begin with; what is measured takes its place. With these
        given and `measure=False` choices depend on acceptance alone.
      measure: whether calls are timed.
    """

    gammas: tuple[int, ...] = (1, 2, 3, 5, 8)
    rounds_per_call: int = 8
    memory: float = 0.8
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    measure: bool = True
    _judged: np.ndarray = dataclasses.field(init=False, repr=False)
    _accepted: np.ndarray = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        if not self.gammas or min(self.gammas) < 1:
            raise ValueError(f"gammas are {self.gammas}; name at least one from 1 up")
        if not self.measure and not self.seconds:
            raise ValueError("measure=False needs the seconds of a round by gamma")
        self._judged = np.zeros(self.max_gamma)
        self._accepted = np.zeros(self.max_gamma)

    @property
    def max_gamma(self) -> int:
        """See `GammaPolicy`."""
        return max(self.gammas)

    def run(self, session: Any, *, batch: int) -> tuple[GammaChoice, ...]:
        """See `GammaPolicy`. What was learned stays for the next session."""
        del batch
        calls: list[GammaChoice] = []
        before = session.statistics()
        while not session.done:
            gamma = self.choose()
            if self.measure:
                session.advance(gamma, 0)  # compiles, where nothing has yet; no rounds are run
                _ = session.done
            began = time.perf_counter()
            session.advance(gamma, self.rounds_per_call)
            after = session.statistics()  # waits for the device
            spent = time.perf_counter() - began
            self._learn(gamma, before, after, spent)
            before = after
            calls.append(GammaChoice(gamma, self.rounds_per_call))
        return tuple(calls)

    def choose(self) -> int:
        """The gamma that promises most by what is known."""
        untried = [g for g in self.gammas if g not in self.seconds]
        if self.measure and len(self.seconds) < min(2, len(self.gammas)):
            return untried[len(untried) // 2]  # two costs make a line
        return max(self.gammas, key=lambda g: (self.expected_tokens(g) / self.cost(g), -g))

    def expected_tokens(self, gamma: int) -> float:
        """Tokens of a round, the target's own included."""
        known = np.flatnonzero(self._judged > 0)
        if not len(known):
            return 1.0 + gamma / 2
        share = self._accepted / np.maximum(self._judged, 1e-9)
        share[known[-1] + 1 :] = share[known[-1]]
        return 1.0 + float(np.cumprod(share[:gamma]).sum())

    def cost(self, gamma: int) -> float:
        """Seconds of a round."""
        if gamma in self.seconds:
            return self.seconds[gamma]
        tried = sorted(self.seconds)
        if len(tried) == 1:
            return self.seconds[tried[0]] * (gamma + 2) / (tried[0] + 2)
        slope, rest = np.polyfit(tried, [self.seconds[g] for g in tried], 1)
        return max(float(slope * gamma + rest), 1e-9)

    def _learn(self, gamma: int, before: Statistics, after: Statistics, spent: float) -> None:
        self._judged *= self.memory
        self._accepted *= self.memory
        for total, new, old in (
            (self._judged, after.judged, before.judged),
            (self._accepted, after.accepted, before.accepted),
        ):
            places = (new - old).sum(axis=0)
            total[: len(places)] += places[: len(total)]
        # Rows end at different times; the loop ran as often as the one that took longest.
        rounds = int((after.rounds - before.rounds).max())
        if self.measure and rounds:
            each = spent / rounds
            past = self.seconds.get(gamma, math.nan)
            kept = self.memory * past + (1 - self.memory) * each
            self.seconds[gamma] = each if math.isnan(past) else kept


def policy_of(gamma: int | GammaPolicy | Sequence[Sequence[GammaChoice]]) -> GammaPolicy:
    """A policy of a number, a log, or itself."""
    if isinstance(gamma, int | numbers.Integral):  # numpy's, too
        return FixedGamma(int(gamma))
    if isinstance(gamma, Sequence):
        return Replay(tuple(tuple(GammaChoice(*call) for call in calls) for calls in gamma))
    return gamma
