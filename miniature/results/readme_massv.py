"""The README's tables of MASSV, from a report that is kept."""

from collections.abc import Mapping
from typing import Any

from miniature.results.readme_tables import found, table, with_interval

FAMILIES = {"qwen2_5_vl": "Qwen2.5-VL", "gemma3": "Gemma 3"}
TASKS = ("descriptions", "questions")
TEMPERATURES = {"t0": "0", "t1": "1"}
GAMMA = "gamma5"
# What the report calls an arm -> what people do.
ARMS = {
    "text": "text only", "text_tuned": "text only, tuned", "original": "data set's answers",
    "massv": "MASSV",
}  # fmt: skip
SHOWN = {"other": "another image", "blank": "a blank one", "none": "none"}


def massv_tables(report: Mapping[str, Any]) -> str:
    """Accepted lengths, what the drafter sees, variants and wall-clock."""
    massv = report["massv"]
    made = (_headline(massv), _distances(massv), _look(massv), _variants(massv), _speed(massv))
    return "\n\n".join(text for text in made if text)


def _headline(massv: Mapping[str, Any]) -> str:
    rows = []
    for family, name in FAMILIES.items():
        for task in TASKS:
            for t, temperature in TEMPERATURES.items():
                at = f"{family}.headline.{task}.{t}.{GAMMA}"
                lengths = [found(massv, f"{at}.{arm}.emitted_length") for arm in ARMS]
                times = found(massv, f"{at}.massv.times_text")
                if all(lengths) and times:
                    what = f"{name}, {task}, {temperature}"
                    rows.append((what, *map(with_interval, lengths), with_interval(times)))
    head = ("tokens a pass, bonus counted; temperature", *ARMS.values(), "MASSV / text only")
    return table(head, rows)


def _distances(massv: Mapping[str, Any]) -> str:
    rows = []
    for family, name in FAMILIES.items():
        for task in TASKS:
            at = f"{family}.headline.{task}.t1.{GAMMA}"
            values = [found(massv, f"{at}.{arm}.tvd") for arm in ARMS]
            if all(values):
                rows.append((f"{name}, {task}", *map(with_interval, values)))
    return table(("total-variation distance, temperature 1", *ARMS.values()), rows)


def _look(massv: Mapping[str, Any]) -> str:
    rows = []
    for family, name in FAMILIES.items():
        at = f"{family}.windows.look.t0.{GAMMA}.massv"
        values = [found(massv, f"{at}.true_minus_{shown}") for shown in SHOWN]
        true = found(massv, f"{at}.true.accepted_length")
        if all(values) and true:
            rows.append((name, with_interval(true), *map(with_interval, values)))
    head = ("accepted drafts a pass", "the image", *(f"less: {text}" for text in SHOWN.values()))
    return table(head, rows)


def _variants(massv: Mapping[str, Any]) -> str:
    rows = []
    for section, baseline in (("variants", "paper"), ("distilled_samples", "all")):
        names = found(massv, f"qwen2_5_vl.{section}.descriptions.t0.{GAMMA}") or {}
        for arm in names:
            cells = [
                _with_difference(
                    found(massv, f"{family}.{section}.descriptions.{t}.{GAMMA}.{arm}"), baseline
                )
                for family in FAMILIES for t in TEMPERATURES
            ]  # fmt: skip
            title = arm if section == "variants" else f"share of the answers: {arm}"
            rows.append((title.replace("_", " "), *cells))
    columns = [f"{name}, {t}" for name in FAMILIES.values() for t in TEMPERATURES.values()]
    return table(("variant, descriptions; temperature", *columns), rows)


def _with_difference(values: Mapping[str, Any] | None, baseline: str) -> str:
    if not values:
        return ""
    length = f"{values['emitted_length']['value']:.2f}"
    less = values.get(f"minus_{baseline}")
    return f"{length} ({with_interval(less, sign=True)})" if less else length


def _speed(massv: Mapping[str, Any]) -> str:
    targets = {
        "qwen2_5_vl.windows": "Qwen2.5-VL as it is", "qwen2_5_vl.grown": "grown to 39 million",
        "gemma3.windows": "Gemma 3 as it is",
    }  # fmt: skip
    rows = []
    for section, name in targets.items():
        speeds = found(massv, f"{section}.speed.descriptions.t0") or {}
        for gamma, arms in speeds.items():
            if "massv" not in arms:
                continue
            values = arms["massv"]
            costs = values["costs"]
            predicted = f"{values['predicted_times_plain_end_to_end']['value']:.2f}"
            rows.append((
                name, gamma.removeprefix("gamma"),
                with_interval(values["times_plain_end_to_end"]), predicted,
                with_interval(values["times_plain_decode"]),
                *(f"{costs[part]['value']:.2f}" for part in ("draft_in_steps", "verify_in_steps")),
                f"{costs['overhead']['value']:.0%}",
            ))  # fmt: skip
    head = (
        "target, descriptions at batch 1", "gamma", "times plain, end to end", "predicted",
        "rounds alone", "a window's drafts, in plain steps", "its check", "loop adds",
    )  # fmt: skip
    return table(head, rows)
