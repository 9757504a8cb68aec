"""Several evaluated runs against each other: ablation arms, each of one or more training seeds.

Everything is computed from the scores that every run gave to every held-out example
(vlv_jax.evaluation.examples), so nothing is run again. The images are the sample: a resample draws
images, takes the same ones for every run of every arm, computes the corpus number of each run from
its sums (F1 is a ratio, not a mean), averages over the runs of an arm and takes the difference. The
interval therefore says how much the held-out images matter. How much the training seed matters is
said by the range over runs, which few seeds cannot turn into an interval.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core_jax.evaluation.bootstrap import Estimate, bootstrap_sums
from core_jax.evaluation.report import StoredMetric, stored_metrics
from vlv_jax.evaluation.examples import ExamplesError, Measure, Score, load_scores, measure

_NAME = re.compile(r"[\w+-]+")
# Values of a config that say where and when, not what was trained.
_NOT_WHAT = re.compile(
    r"run\.(seed|log_every|save_every|sample_every|keep)$|evaluation\.|sampling\.|.*num_threads$"
)


class ArmsError(ValueError):
    """Runs cannot be compared; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A directory that `python -m vlv_jax.evaluate` wrote to.

    Attributes:
      path: the directory.
      scores: score name -> example id -> score.
      stored: the metrics of its report.
    """

    path: pathlib.Path
    scores: Mapping[str, Mapping[str, Score]]
    stored: Sequence[StoredMetric]

    def entry(self, metric: str) -> StoredMetric | None:
        """The report's own number, with the settings it was measured with; None if there is none.

        Raises:
          ArmsError: the report's number is not what the saved examples give.
        """
        named = [s for s in self.stored if s.name == metric]
        if not named:
            return None
        found = self.measure(metric)
        value = float(found.statistic(found.rows.sum(axis=0)))
        for stored in named:
            other = stored.entry["value"]
            if other is not None and math.isclose(other, value, rel_tol=1e-5, abs_tol=1e-9):
                return stored
        raise ArmsError(
            f"{self.path}: the report says {metric} = {named[0].entry['value']}, the saved "
            f"examples give {value:.6g}; they are of different evaluations, evaluate it again"
        )

    def measure(self, metric: str) -> Measure:
        """The metric as sums over examples.

        Raises:
          ArmsError: it was not measured.
        """
        try:
            return measure(self.scores, metric)
        except ExamplesError as error:
            raise ArmsError(f"{self.path}: {error}") from error

    def config(self, metric: str) -> Mapping[str, Any]:
        """The config it was trained with, dotted; empty where nothing says."""
        entry = self.entry(metric)
        known = ([entry] if entry else []) + list(self.stored)
        facts = next((s.provenance for s in known if "config" in s.provenance), {})
        return _flat(facts.get("config", {}))


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed only.

    Attributes:
      name: letters, digits, _, + and -.
      runs: at least one.
    """

    name: str
    runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One metric of one arm.

    Attributes:
      name: of the arm.
      mean: over its runs, with the interval over images.
      values: of each run.
      seeds: training seed of each run, None where nothing says.
      difference: from the baseline; None for the baseline itself and where there is none.
    """

    name: str
    mean: Estimate
    values: tuple[float, ...]
    seeds: tuple[int | None, ...]
    difference: Estimate | None = None


def load_arm(name: str, directories: Sequence[str | pathlib.Path]) -> Arm:
    """Reads what was saved of an arm's runs.

    Raises:
      ArmsError: an impossible name, no directory, one twice, or nothing saved in it.
    """
    if not _NAME.fullmatch(name):
        raise ArmsError(f"the arm {name!r} must be named with letters, digits, _, + and - only")
    paths = [pathlib.Path(directory).expanduser() for directory in directories]
    if not paths:
        raise ArmsError(f"the arm {name} has no directory")
    runs = []
    for i, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:i]]:
            raise ArmsError(f"the arm {name} has {path} twice; its runs must differ in their seed")
        try:
            runs.append(Run(path, load_scores(path), stored_metrics(path)))
        except ValueError as error:  # no examples, or a report of another version
            raise ArmsError(str(error)) from error
    return Arm(name, tuple(runs))


def compare_arms(
    arms: Sequence[Arm], metric: str, *, baseline: str = "", **options: Any
) -> list[ArmResult]:
    """Computes one metric of every arm, and its paired difference from a baseline.

    Args:
      arms: at least one.
      metric: as in the runs' report.json, without the section, such as "caption.object_f1".
      baseline: name of an arm; empty for no differences.
      **options: seed, num_resamples and level of `bootstrap.bootstrap_sums`.

    Raises:
      ArmsError: no such baseline, a metric that a run lacks, runs on different images or with
        different ground truth.
    """
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise ArmsError(f"two arms have one name: {', '.join(names)}")
    if baseline and baseline not in names:
        raise ArmsError(f"the baseline {baseline!r} is none of the arms {', '.join(names)}")
    measures = {arm.name: [run.measure(metric) for run in arm.runs] for arm in arms}
    _check_same_images(arms, measures, metric)
    results = []
    for arm in arms:
        own = measures[arm.name]
        difference = None
        if baseline and arm.name != baseline:
            difference = _estimate(own, measures[baseline], **options)
        results.append(
            ArmResult(
                name=arm.name,
                mean=_estimate(own, **options),
                values=tuple(float(m.statistic(m.rows.sum(axis=0))) for m in own),
                seeds=tuple(run.config(metric).get("run.seed") for run in arm.runs),
                difference=difference,
            )
        )
    return results


def _estimate(plus: Sequence[Measure], minus: Sequence[Measure] = (), **options: Any) -> Estimate:
    """Mean over some runs, minus that over others, by images."""
    every = [*plus, *minus]
    ends = np.cumsum([0, *(m.rows.shape[1] for m in every)])

    def statistic(sums: np.ndarray) -> np.ndarray:
        values = [
            m.statistic(sums[..., start:stop])
            for m, start, stop in zip(every, ends[:-1], ends[1:], strict=True)
        ]
        mean = np.mean(values[: len(plus)], axis=0)
        return mean - np.mean(values[len(plus) :], axis=0) if minus else mean

    return bootstrap_sums(np.concatenate([m.rows for m in every], axis=1), statistic, **options)


def _check_same_images(
    arms: Sequence[Arm], measures: Mapping[str, Sequence[Measure]], metric: str
) -> None:
    first, first_run = measures[arms[0].name][0], arms[0].runs[0]
    for arm in arms:
        for run, found in zip(arm.runs, measures[arm.name], strict=True):
            only = sorted(set(found.ids) ^ set(first.ids))
            if only:
                raise ArmsError(
                    f"{metric} of {first_run.path} is of {len(first.ids)} images, that of "
                    f"{run.path} of {len(found.ids)}, and {len(only)} are in one only, such as "
                    f"{only[0]}; evaluate both on the same images"
                )
            columns = list(found.truth)
            differ = (found.rows[:, columns] != first.rows[:, columns]).any(axis=1)
            if differ.any():
                raise ArmsError(
                    f"{metric}: the ground truth of {first.ids[int(np.argmax(differ))]} is another "
                    f"in {run.path} than in {first_run.path}; evaluate both with the same data "
                    "and scorer"
                )


def measured_with(arms: Sequence[Arm], metric: str) -> tuple[dict[str, Any], dict[str, list]]:
    """Settings that all runs were evaluated with, and those that differ, with their values."""
    entries = [run.entry(metric) for arm in arms for run in arm.runs]
    settings = [entry.entry["settings"] if entry else {} for entry in entries]
    # What follows from the numbers is no setting.
    names = dict.fromkeys(k for s in settings for k in s if k != "excludes_zero")
    columns = {name: [s.get(name) for s in settings] for name in names}
    same = {name: column[0] for name, column in columns.items() if _all_equal(column)}
    return same, {name: column for name, column in columns.items() if name not in same}


def trained_with(arms: Sequence[Arm], metric: str) -> dict[str, list[str]]:
    """Config values that differ between arms -> their value in each arm.

    Values that differ between the runs of an arm as well, such as the seed or what it was started
    from, are left out.
    """
    configs = [[run.config(metric) for run in arm.runs] for arm in arms]
    names = dict.fromkeys(k for runs in configs for config in runs for k in config)
    found = {}
    for name in names:
        columns = [[config.get(name) for config in runs] for runs in configs]
        within = all(_all_equal(column) for column in columns)
        if within and not _NOT_WHAT.match(name) and not _all_equal([c[0] for c in columns]):
            found[name] = [_short(column[0]) for column in columns]
    return found


def _all_equal(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in ("", None) else str(value)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found
