"""What was measured, as numbers, tables and plots of a report."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core_jax.evaluation.bootstrap import Estimate, bootstrap_ratio
from core_jax.evaluation.report import Report
from core_jax.evaluation.report_text import interval_text, number_text
from massv_jax.evaluation.acceptance import (
    Measured,
    acceptance,
    accepted_length,
    difference,
    emitted_length,
    times,
)
from massv_jax.evaluation.forced import Forced
from massv_jax.evaluation.looking import Shown

BASELINE = "text"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where numbers go, and how intervals are made.

    Attributes:
      report, section: of the report.
      options: of every bootstrap.
      settings: of every number.
    """

    report: Report
    section: str
    options: Mapping[str, Any]
    settings: Mapping[str, Any]

    def add(self, name: str, value: float | Estimate, **more: Any) -> None:
        """A number."""
        self.report.add_metric(self.section, name, value, settings=self.settings, **more)


def tag(temperature: float) -> str:
    """A temperature in a name: t0, t1, t0_7."""
    return f"t{temperature:g}".replace(".", "_")


def shown(estimate: Estimate) -> str:
    """A number and its interval."""
    interval = interval_text([estimate.low, estimate.high])
    return f"{number_text(estimate.value)} {interval}".strip()


def report_acceptance(
    place: Place,
    task: str,
    temperature: float,
    arms: Mapping[tuple[str, int], Measured],
    identical: Mapping[tuple[str, int], np.ndarray],
) -> None:
    """One task at one temperature.

    Args:
      place: where it goes.
      task: its name.
      temperature: of the answers.
      arms: (arm, gamma) -> the task's questions.
      identical: (arm, gamma) -> whether each answer is plain decoding's; empty if not comparable.
    """
    rows = []
    for (arm, gamma), measured in arms.items():
        name = f"{task}.{tag(temperature)}.gamma{gamma}.{arm}"
        accepted = accepted_length(measured, **place.options)
        emitted = emitted_length(measured, **place.options)
        place.add(f"{name}.accepted_length", accepted)
        place.add(f"{name}.emitted_length", emitted)
        by_place = acceptance(measured, **place.options)
        for i, estimate in enumerate(by_place):
            place.add(f"{name}.acceptance.place{i + 1}", estimate)
        gain = ""
        base = arms.get((BASELINE, gamma))
        if base is not None and arm != BASELINE:
            found = times(measured, base, **place.options)
            place.add(f"{name}.times_{BASELINE}", found)
            gain = shown(found)
        same = identical.get((arm, gamma))
        if same is not None:
            place.add(f"{name}.identical_to_plain", float(same.mean()), n=len(same))
        cell = "" if same is None else f"{int(same.sum())} of {len(same)}"
        rows.append([arm, gamma, shown(emitted), shown(accepted), gain, cell])
    columns = [
        "arm", "gamma", "tokens a pass, bonus counted", "accepted drafts a pass",
        f"times {BASELINE}", "same answer as plain decoding",
    ]  # fmt: skip
    title = f"{task}, temperature {temperature:g}"
    place.report.add_table(place.section, title, columns, rows)
    _plot_places(place, title, arms)


def _plot_places(place: Place, title: str, arms: Mapping[tuple[str, int], Measured]) -> None:
    longest: dict[str, tuple[int, Measured]] = {}
    for (arm, gamma), measured in arms.items():
        if gamma >= longest.get(arm, (0, measured))[0]:
            longest[arm] = (gamma, measured)
    series = {}
    for arm, (gamma, measured) in longest.items():
        found = acceptance(measured, **place.options)
        series[arm] = {
            "x": range(1, gamma + 1), "y": [e.value for e in found],
            "low": [e.low for e in found], "high": [e.high for e in found],
        }  # fmt: skip
    if series:
        place.report.add_plot(
            place.section, f"Acceptance by place: {title}", series,
            x_label="place in the window", y_label="accepted, of those compared",
        )  # fmt: skip


def report_forced(place: Place, task: str, temperature: float, arms: Mapping[str, Forced]) -> None:
    """Distances between drafters' distributions and the target's on its own answers."""
    rows, series = [], {}
    for arm, forced in arms.items():
        name = f"{task}.{tag(temperature)}.forced.{arm}"
        for kind, where in forced.classes().items():
            counts = where.sum(axis=1)
            if not counts.sum():
                continue
            tvd = _share((1 - forced.overlap), where, place.options)
            agree = _share(forced.agree, where, place.options)
            place.add(f"{name}.{kind}.tvd", tvd)
            place.add(f"{name}.{kind}.top1_agreement", agree)
            rows.append([arm, kind, int(counts.sum()), shown(tvd), shown(agree)])
        near = _share(forced.overlap > 0.9, forced.counted, place.options)
        place.add(f"{name}.share_below_0_1", near)
        shares, edges = forced.histogram()
        series[arm] = {"x": ((edges[1:] + edges[:-1]) / 2).tolist(), "y": shares.tolist()}
    title = f"{task}, temperature {temperature:g}: distance from the target on its own answers"
    columns = ["arm", "tokens", "number", "TVD", "same most likely token"]
    place.report.add_table(place.section, title, columns, rows)
    place.report.add_plot(
        place.section, f"TVD: {task}, temperature {temperature:g}", series, x_label="TVD",
        y_label="share of tokens",
    )  # fmt: skip


def _share(values: np.ndarray, where: np.ndarray, options: Mapping[str, Any]) -> Estimate:
    """Mean over tokens, questions resampled."""
    return bootstrap_ratio(np.where(where, values, 0).sum(axis=1), where.sum(axis=1), **options)


def report_look(
    place: Place, temperature: float, gamma: int, arms: Mapping[str, Mapping[Shown, Measured]]
) -> None:
    """Accepted lengths by what drafters are shown, and what the true image is worth."""
    rows = []
    for arm, found in arms.items():
        name = f"look.{tag(temperature)}.gamma{gamma}.{arm}"
        for what, measured in found.items():
            accepted = accepted_length(measured, **place.options)
            place.add(f"{name}.{what}.accepted_length", accepted)
            less = ""
            if what != "true":
                loss = difference(found["true"], measured, **place.options)
                place.add(f"{name}.true_minus_{what}", loss)
                less = shown(loss)
            rows.append([arm, what, shown(accepted), less])
    columns = [
        "arm",
        "image shown to the drafter",
        "accepted drafts a pass",
        "true image less this",
    ]
    title = f"Does the drafter look? Temperature {temperature:g}, gamma {gamma}"
    place.report.add_table(place.section, title, columns, rows)


def records(
    ids: Sequence[str], tasks: Mapping[str, Sequence[int]], measured: Measured, **facts: Any
) -> list[dict[str, Any]]:
    """A line for each question, for whoever wants other statistics."""
    task_of = {i: task for task, which in tasks.items() for i in which}
    s = measured.statistics
    return [
        {
            "id": ids[i], "task": task_of[i], **facts, "tokens": int(measured.lengths[i]),
            "rounds": int(s.rounds[i]), "emitted": int(s.emitted[i]),
            "judged": s.judged[i].tolist(), "accepted": s.accepted[i].tolist(),
        }
        for i in sorted(task_of)
    ]  # fmt: skip
