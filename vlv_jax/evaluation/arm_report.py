"""Arms of a comparison in a report: numbers, a table, a plot, and what the arms differ in."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from core_jax.evaluation.provenance import command_facts, from_here
from core_jax.evaluation.report import Report
from core_jax.evaluation.report_text import interval_text, number_text, setting_text
from vlv_jax.evaluation.arms import (
    Arm,
    ArmResult,
    ArmsError,
    compare_arms,
    measured_with,
    trained_with,
)
from vlv_jax.evaluation.examples import ExamplesError, measure, measures_of

_NOTE = (
    "Intervals resample the held-out images, the same ones for every run, and average over an "
    "arm's runs; the range is over its training seeds."
)


def compare(
    arms: Sequence[Arm],
    metrics: Sequence[str],
    out: str | pathlib.Path,
    *,
    section: str,
    baseline: str = "",
    note: str = "",
    title: str | None = None,
    **options: Any,
) -> dict[str, list[ArmResult]]:
    """Compares arms and writes the result into a report.

    Args:
      arms: from `load_arm`. A single one without a baseline is a mean over seeds.
      metrics: as in the runs' report.json, without the section; "all" for every one.
      out: folder of the report; what other commands wrote there stays.
      section: where in the report; dots nest it.
      baseline: name of the arm that others are compared with; empty for none.
      note: a remark for the page.
      title: of the page; None keeps the one that is there.
      **options: seed, num_resamples and level of the intervals.

    Returns:
      Metric -> what each arm has, in the order of the arms.

    Raises:
      ArmsError: see `vlv_jax.evaluation.arms.compare_arms`.
    """
    if not arms:
        raise ArmsError("there is no arm to compare")
    for run in (run for arm in arms for run in arm.runs):
        if run.path.resolve() == pathlib.Path(out).resolve():
            raise ArmsError(f"{out} is a run's own report; write the comparison to another folder")
    names = all_metrics(arms) if list(metrics) == ["all"] else list(dict.fromkeys(metrics))
    results = {m: compare_arms(arms, m, baseline=baseline, **options) for m in names}
    report = Report(title, _provenance(arms, baseline))
    if len(arms) == 1 and not baseline:
        for top in dict.fromkeys(metric.split(".")[0] for metric in results):
            report.begin_group(f"{top}, mean over seeds")
            own = {m: found for m, found in results.items() if m.split(".")[0] == top}
            _add_mean(report, section, arms, own, note)
    else:
        for metric, found in results.items():
            # A metric that is compared again is replaced with all of its old arms.
            report.begin_group(metric)
            _add_comparison(report, section, arms, metric, found, baseline, note)
    report.write(out)
    return results


def all_metrics(arms: Sequence[Arm]) -> list[str]:
    """Metrics that every run has, with the differences between conditions that its report has."""
    common: list[str] | None = None
    for run in (run for arm in arms for run in arm.runs):
        names = measures_of(run.scores)
        for stored in run.stored:
            if "_difference." in stored.name:
                try:
                    measure(run.scores, stored.name)
                except ExamplesError:
                    continue
                names.append(stored.name)
        common = [n for n in common if n in names] if common is not None else names
    return list(dict.fromkeys(common or []))


def _provenance(arms: Sequence[Arm], baseline: str) -> dict[str, Any]:
    """Every run's own facts; the whole config of the first."""
    own: dict[str, dict[str, Any]] = {}
    for arm in arms:
        for i, run in enumerate(arm.runs):
            facts = dict(run.stored[0].provenance) if run.stored else {}
            keep = {k: v for k, v in facts.items() if k != "config" or not own}
            own[f"{arm.name} {i + 1}"] = {"directory": from_here(str(run.path)), **keep}
    return command_facts() | {"baseline": baseline or "none", "runs": own}


def _settings(arms: Sequence[Arm], arm: Arm, metric: str, found: ArmResult) -> dict[str, Any]:
    """What a number depends on: how it was measured, and which runs it is of."""
    same, _ = measured_with(arms, metric)
    same.pop("bootstrap_samples", None)  # of the single runs' own intervals
    return same | {
        "intervals": "over images, of the mean over runs",
        "bootstrap_samples": found.mean.num_resamples,
        "training_seeds": list(found.seeds),
        "per_run": list(found.values),
        "range": [min(found.values), max(found.values)],
        "runs": [from_here(str(run.path)) for run in arm.runs],
    }


def _warnings(arms: Sequence[Arm], metric: str) -> str:
    _, differ = measured_with(arms, metric)
    parts = [
        f"Careful: the runs were evaluated with different {name}: {setting_text(values)}."
        for name, values in differ.items()
        if name != "bootstrap_samples"
    ]
    unknown = [from_here(str(r.path)) for arm in arms for r in arm.runs if r.entry(metric) is None]
    if unknown:
        parts.append(f"How {', '.join(unknown)} was evaluated is not known (no report there).")
    return " ".join(parts)


def _add_comparison(
    report: Report, section: str, arms: Sequence[Arm], metric: str,
    results: Sequence[ArmResult], baseline: str, note: str,
) -> None:  # fmt: skip
    rows = []
    for arm, found in zip(arms, results, strict=True):
        settings = _settings(arms, arm, metric, found)
        report.add_metric(section, f"{metric}.{found.name}", found.mean, settings=settings)
        difference = found.difference
        rows.append([
            found.name, found.mean.value, *_row(found), *_difference_cells(difference),
        ])  # fmt: skip
        if difference is not None:
            name = f"{metric}_difference.{found.name}_minus_{baseline}"
            own = {k: v for k, v in settings.items() if k not in ("per_run", "range")}
            own["excludes_zero"] = difference.excludes_zero
            report.add_metric(section, name, difference, settings=own)
    columns = ["arm", metric, "95 % interval", "range over seeds", "n", "training seeds"]
    columns += [f"minus {baseline}", "its interval", "excludes 0"] if baseline else []
    width = len(columns)
    remarks = " ".join(filter(None, (note, _NOTE, _warnings(arms, metric))))
    report.add_table(section, f"{metric} by arm", columns, [r[:width] for r in rows], note=remarks)
    report.add_plot(
        section, f"{metric} by arm, with intervals",
        {metric: {
            "x": [found.name for found in results],
            "y": [found.mean.value for found in results],
            "low": [found.mean.low for found in results],
            "high": [found.mean.high for found in results],
        }},
        kind="bar", y_label=metric,
        note=f"n = {results[0].mean.n} images. " + "; ".join(
            f"{found.name}: training seeds {_seeds(found)}" for found in results
        ),
    )  # fmt: skip
    differences = trained_with(arms, metric)
    if differences:
        report.add_table(
            section, f"What the arms of {metric} were trained with",
            ["config value", *(arm.name for arm in arms)],
            [[name, *values] for name, values in differences.items()],
            note="Config values that differ between arms; all others are the same.",
        )  # fmt: skip


def _add_mean(
    report: Report, section: str, arms: Sequence[Arm],
    results: Mapping[str, Sequence[ArmResult]], note: str,
) -> None:  # fmt: skip
    for metric, (found,) in results.items():
        settings = _settings(arms, arms[0], metric, found)
        if "_difference." in metric:
            settings["excludes_zero"] = found.mean.excludes_zero
        remarks = " ".join(filter(None, (note, _warnings(arms, metric))))
        settings |= {"remarks": remarks} if remarks else {}
        report.add_metric(section, metric, found.mean, settings=settings)


def _row(found: ArmResult) -> list[Any]:
    spread = interval_text((min(found.values), max(found.values)))
    return [
        interval_text((found.mean.low, found.mean.high)),
        spread if len(found.values) > 1 else "one run", found.mean.n, _seeds(found),
    ]  # fmt: skip


def _difference_cells(difference) -> list[Any]:
    if difference is None:
        return ["", "", ""]
    return [
        number_text(difference.value), interval_text((difference.low, difference.high)),
        "yes" if difference.excludes_zero else "no",
    ]  # fmt: skip


def _seeds(found: ArmResult) -> str:
    return ", ".join("not known" if seed is None else str(seed) for seed in found.seeds)


def result_line(metric: str, found: ArmResult, baseline: str) -> str:
    """One line for a terminal."""
    text = f"{metric} {found.name}: {number_text(found.mean.value)} {_row(found)[0]}"
    if found.difference is not None:
        value, interval, excludes = _difference_cells(found.difference)
        text += f", minus {baseline} {value} {interval}, excludes 0: {excludes}"
    return text
