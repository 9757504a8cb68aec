"""Arms whose runs differ in the seed of training, from the lines that evaluations wrote."""

import dataclasses
import json
import pathlib
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
from massv_jax.evaluation.prompts import EvaluationError

RECORDS = "evaluated_acceptance.jsonl"


@dataclasses.dataclass(frozen=True)
class Arm:
    """Counts on the same questions, a row a question, a column a run.

    Attributes:
      ids: of the questions.
      emitted: tokens, the target's own included; float [n, runs].
      accepted: drafts; float [n, runs].
      rounds: passes of the target; float [n, runs].
      distance: total-variation distance, summed over an answer's places; float [n, runs], or None
        where a drafter has no distributions.
      places: of an answer; float [n, runs].
    """

    ids: tuple[str, ...]
    emitted: np.ndarray
    accepted: np.ndarray
    rounds: np.ndarray
    distance: np.ndarray | None = None
    places: np.ndarray | None = None

    def sums(self, what: np.ndarray) -> np.ndarray:
        """[n, 2]: what is counted, and rounds, over all runs."""
        return np.stack([what.sum(axis=1), self.rounds.sum(axis=1)], axis=1)

    def emitted_length(self, **options: Any) -> Estimate:
        """Tokens a round over all runs; questions are resampled."""
        return bootstrap_ratio(*self.sums(self.emitted).T, **options)

    def accepted_length(self, **options: Any) -> Estimate:
        """Accepted drafts a round."""
        return bootstrap_ratio(*self.sums(self.accepted).T, **options)

    def tvd(self, **options: Any) -> Estimate | None:
        """Total-variation distance from the target in a place of its answers."""
        if self.distance is None or self.places is None:
            return None
        return bootstrap_ratio(self.distance.sum(axis=1), self.places.sum(axis=1), **options)

    def by_run(self) -> list[float]:
        """Tokens a round of each run."""
        return (self.emitted.sum(axis=0) / self.rounds.sum(axis=0)).tolist()

    def times(self, base: "Arm", **options: Any) -> Estimate:
        """Emitted length over that of another arm on the same questions."""
        return bootstrap_quotient(self.sums(self.emitted), base.sums(base.emitted), **options)

    def minus(self, base: "Arm", **options: Any) -> Estimate:
        """Emitted length less that of another arm on the same questions."""
        rows = self.sums(self.emitted), base.sums(base.emitted)
        return bootstrap_difference(*rows, lambda s: ratio(s[..., 0], s[..., 1]), **options)


Key = tuple[str, float, int]  # task, temperature, gamma
Lines = Mapping[tuple[str, Key], Mapping[str, Mapping[str, Any]]]


def read_lines(directories: Sequence[str | pathlib.Path]) -> Lines:
    """(run, (task, temperature, gamma)) -> id -> line.

    Args:
      directories: what `python -m massv_jax.evaluate` wrote; a run's name is that of its `--arm`.

    Raises:
      EvaluationError: a directory has no lines, or a run occurs twice.
    """
    found: dict[tuple[str, Key], dict[str, Any]] = {}
    where: dict[str, pathlib.Path] = {}
    for directory in map(pathlib.Path, directories):
        file = directory / RECORDS
        if not file.is_file():
            raise EvaluationError(
                f"{file} is missing; run `python -m massv_jax.evaluate --out {directory}` first"
            )
        for text in file.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            run = line["arm"]
            if where.setdefault(run, directory) != directory:
                raise EvaluationError(
                    f"{run!r} is measured in {where[run]} and in {directory}; give it two names"
                )
            key = (line["task"], float(line["temperature"]), int(line["gamma"]))
            found.setdefault((run, key), {})[line["id"]] = line
    return found


def keys_of(lines: Lines) -> list[Key]:
    """All tasks, temperatures and windows, in order."""
    return sorted({key for _, key in lines})


def make_arm(lines: Lines, runs: Sequence[str], key: Key) -> Arm | None:
    """Runs that differ in their seed; None where none of them was measured so.

    Raises:
      EvaluationError: some were and some were not, or on other questions.
    """
    measured = [lines.get((run, key)) for run in runs]
    if not any(measured):
        return None
    missing = [run for run, found in zip(runs, measured, strict=True) if not found]
    if missing:
        raise EvaluationError(f"{', '.join(missing)}: not measured at {key}")
    kept = [found for found in measured if found]
    ids = tuple(sorted(kept[0]))
    for run, found in zip(runs, kept, strict=True):
        if tuple(sorted(found)) != ids:
            raise EvaluationError(f"{run}: other questions than {runs[0]} at {key}")

    def table(of: Callable[[Mapping[str, Any]], float]) -> np.ndarray:
        return np.array([[of(found[i]) for found in kept] for i in ids], float)

    emitted, rounds = table(lambda line: line["emitted"]), table(lambda line: line["rounds"])
    accepted = table(lambda line: sum(line["accepted"]))
    if not all("distance" in found[i] for found in kept for i in ids):
        return Arm(ids, emitted, accepted, rounds)
    distance, places = table(lambda line: line["distance"]), table(lambda line: line["places"])
    return Arm(ids, emitted, accepted, rounds, distance, places)
