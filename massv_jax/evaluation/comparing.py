"""Arms beside one another in a report: lengths, and what they are of a baseline's."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from core_jax.evaluation.report import Report
from massv_jax.evaluation.arms import Arm, Key, Lines, keys_of, make_arm
from massv_jax.evaluation.prompts import EvaluationError
from massv_jax.evaluation.reporting import Place, shown, tag


def compare(
    lines: Lines,
    arms: Mapping[str, Sequence[str]],
    out: str | pathlib.Path,
    *,
    section: str,
    baseline: str = "",
    gammas: Sequence[int] = (),
    note: str = "",
    title: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Adds a section to the report in `out`.

    Args:
      lines: from `read_lines`.
      arms: name -> names of its runs.
      out: folder of the report.
      section: dots nest it.
      baseline: an arm that the others are compared with; empty: none.
      gammas: windows to tell of; all by default.
      note: a remark for the page.
      title: of the page; the one that is there by default.
      options: of the bootstrap.

    Raises:
      EvaluationError: an arm was not measured, or the baseline is none of the arms.
    """
    if baseline and baseline not in arms:
        raise EvaluationError(f"the baseline {baseline!r} is none of {', '.join(arms)}")
    report = Report(title)
    report.begin_group(f"compare.{section}")
    options = {"seed": 0, "num_resamples": 2000, **(options or {})}
    place = Place(report, section, options, {"runs": {k: list(v) for k, v in arms.items()}})
    told = 0
    for key in keys_of(lines):
        if gammas and key[2] not in gammas:
            continue
        found = {name: make_arm(lines, runs, key) for name, runs in arms.items()}
        measured = {name: arm for name, arm in found.items() if arm is not None}
        if len(measured) == len(arms):
            told += 1
            _tell(place, key, measured, baseline, note)
    if not told:
        names = ", ".join(sorted({run for run, _ in lines}))
        raise EvaluationError(f"no task, temperature and window has all arms; measured: {names}")
    report.write(out)
    return report


def _tell(place: Place, key: Key, arms: Mapping[str, Arm], baseline: str, note: str) -> None:
    task, temperature, gamma = key
    rows = []
    base = arms.get(baseline)
    for name, arm in arms.items():
        at = f"{task}.{tag(temperature)}.gamma{gamma}.{name}"
        emitted = arm.emitted_length(**place.options)
        place.add(f"{at}.emitted_length", emitted)
        place.add(f"{at}.accepted_length", arm.accepted_length(**place.options))
        tvd = arm.tvd(**place.options)
        if tvd is not None:
            place.add(f"{at}.tvd", tvd)
        cells = ["", ""]
        if base is not None and name != baseline:
            times, less = arm.times(base, **place.options), arm.minus(base, **place.options)
            place.add(f"{at}.times_{baseline}", times)
            place.add(f"{at}.minus_{baseline}", less)
            cells = [shown(times), shown(less)]
        by_run = " ".join(f"{x:.2f}" for x in arm.by_run())
        rows.append([name, shown(emitted), *cells, by_run, "" if tvd is None else shown(tvd)])
    columns = ["arm", "tokens a pass, bonus counted", f"times {baseline}", f"less {baseline}",
               "each run", "TVD"]  # fmt: skip
    title = f"{task}, temperature {temperature:g}, gamma {gamma}"
    place.report.add_table(place.section, f"{title}. {note}" if note else title, columns, rows)
