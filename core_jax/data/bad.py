"""Counting and listing the examples that were refused, and stopping when they are too many."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from core_jax.data.images import ImageLimits, Reason


class TooManyBadExamples(RuntimeError):
    """More examples were refused than the policy allows; the message counts and names them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPolicy:
    """What is accepted, and when too much was refused.

    Attributes:
        limits: Of the images.
        require_caption: Refuse examples without a caption (NO_CAPTION).
        max_bad_fraction: The run stops when more than this fraction of the positions met a bad
            example at first; 1.0 never stops.
        min_seen: Positions before the fraction means anything.
        max_attempts: Draws at one position (the first included) before the run stops.
        max_listed: Ids kept; all are counted.
    """

    limits: ImageLimits = dataclasses.field(default_factory=ImageLimits)
    require_caption: bool = False
    max_bad_fraction: float = 0.05
    min_seen: int = 200
    max_attempts: int = 32
    max_listed: int = 10_000

    def __post_init__(self):
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}; it is in 0..1")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; it is at least 1")


class BadLog:
    """The refused examples of one iterator of one process.

    Attributes:
        seen: Positions so far.
        met: Positions whose first draw was bad.
        ids: {id: reason} of the first `max_listed` different ones.
        counts: {reason: number of draws}.
    """

    def __init__(self, policy: DataPolicy):
        self._policy = policy
        self.seen = self.met = 0
        self.ids: dict[str, Reason] = {}
        self.counts: collections.Counter[Reason] = collections.Counter()

    def add(self, bad: Sequence[tuple[str, Reason]]) -> None:
        """Books one position and the bad draws (id, reason) made there."""
        self.seen += 1
        self.met += bool(bad)
        for example_id, reason in bad:
            self.counts[reason] += 1
            if len(self.ids) < self._policy.max_listed:
                self.ids.setdefault(example_id, reason)

    @property
    def fraction(self) -> float:
        """Positions that met a bad example over positions seen."""
        return self.met / max(1, self.seen)

    def check(self) -> None:
        """Raises `TooManyBadExamples` past the policy's fraction."""
        policy = self._policy
        if self.seen >= policy.min_seen and self.fraction > policy.max_bad_fraction:
            raise self.error(f"more than max_bad_fraction={policy.max_bad_fraction:g}")

    def error(self, why: str) -> TooManyBadExamples:
        """The exception to raise, with counts by reason and the first ids."""
        counts = ", ".join(f"{reason} {n}" for reason, n in self.counts.most_common())
        shown = [f"{example_id} ({reason})" for example_id, reason in list(self.ids.items())[:20]]
        more = f" and {len(self.ids) - 20} more" if len(self.ids) > 20 else ""
        return TooManyBadExamples(
            f"{self.met} of {self.seen} examples are unusable: {why}. By reason: {counts}. They "
            f"are: {', '.join(shown)}{more}. Look at the data (python -m core_jax.data.check), "
            "widen the limits, or raise max_bad_fraction."
        )

    def summary(self) -> dict[str, Any]:
        """JSON-like: seen, met, fraction, counts by reason, ids."""
        return {
            "seen": self.seen,
            "met": self.met,
            "fraction": self.fraction,
            "counts": {str(reason): n for reason, n in self.counts.items()},
            "ids": {key: str(reason) for key, reason in self.ids.items()},
        }
