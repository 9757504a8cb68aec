"""report.json, which programs read, and report.html, which people read, from several commands.

Each command makes a `Report`, adds what it measured under its own section and writes it into the
same directory. Numbers are in report.json, nested by the dots in section and name:

    report.add_metric("vlv", "stage1.denoising_loss.caption", 0.12, n=500, seed=0,
                      interval=(0.11, 0.13))

is found at report["vlv"]["stage1"]["denoising_loss"]["caption"]["value"]. Tables, plots and
pictures are kept for the page in report_parts/, one file a section.

Within a section, what is measured together is a group (`Report.begin_group`). Writing a group
replaces the whole group that was there, so that nothing of an older measurement with other
settings is left among the new numbers. Groups that were not measured again stay, with their own
provenance, and so do other sections. A name is in one group of a section: the one written last.
"""

import dataclasses
import datetime
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core_jax.evaluation.bootstrap import Estimate
from core_jax.evaluation.report_html import render
from core_jax.evaluation.report_images import GalleryRow, encode_rows
from core_jax.files import write_whole

FORMAT = 2
_KINDS = ("metrics", "tables", "plots", "galleries")


class Report:
    """Collects numbers, tables, plots and pictures, and writes them.

    Args:
        title: Heading of the page; the last command that writes decides. None keeps the one that
            is there.
        provenance: Facts about the run (command, commit, versions); kept and shown per group.
    """

    def __init__(self, title: str | None, provenance: Mapping[str, Any] | None = None):
        self.title = title
        self._provenance = dict(provenance or {})
        self._group = "main"
        self._sections: dict[str, dict[str, dict]] = {}

    def begin_group(self, name: str) -> None:
        """What is added from now on, to any section, belongs to this group."""
        self._group = name

    def add_metric(
        self,
        section: str,
        name: str,
        value: float | Estimate,
        *,
        n: int | None = None,
        interval: tuple[float, float] | None = None,
        seed: int | None = None,
        settings: Mapping[str, Any] | None = None,
        level: float = 0.95,
    ) -> None:
        """Adds a number.

        Args:
            section: Where it belongs.
            name: What it is; dots nest it in report.json.
            value: The number, or an `Estimate`, which brings n, interval, seed and level along. A
                number that is not finite is written as null and shown as "not finite".
            n: Number of examples.
            interval: Lower and upper end.
            seed: Seed of what is random about it.
            settings: What else it depends on (guidance, steps, checkpoint, ...).
            level: Coverage of the interval.

        Raises:
            ValueError: A plain number without n, or an interval that is upside down.
        """
        entry: dict[str, Any] = {"n": n, "seed": seed, "interval": interval, "level": level}
        if isinstance(value, Estimate):
            estimate, value = value, value.value
            given = {key: item for key, item in entry.items() if item is not None}
            entry = {**estimate.as_dict(), **given, "level": estimate.level}
        if entry["n"] is None:
            raise ValueError(f"metric {section}.{name} needs n, the number of examples behind it")
        if entry["interval"] is None:
            entry["level"] = None
        else:
            low, high = (_number(end) for end in entry["interval"])
            if low is not None and high is not None and low > high:
                raise ValueError(f"metric {section}.{name} has the interval {low} to {high}")
            entry["interval"] = [low, high]
        entry = {"value": _number(value), **{k: v for k, v in entry.items() if k != "value"}}
        entry["settings"] = settings or {}
        self._section(section)["metrics"][name] = _plain(entry)

    def add_table(
        self,
        section: str,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        note: str = "",
    ) -> None:
        """Adds a table; cells are text or numbers.

        Raises:
            ValueError: A row has another number of cells than there are columns.
        """
        for i, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(
                    f"table {title!r}: row {i} has {len(row)} cells for {len(columns)} columns"
                )
        self._section(section)["tables"][title] = {
            "columns": list(columns),
            "rows": [[_plain(cell) for cell in row] for row in rows],
            "note": note,
        }

    def add_plot(
        self,
        section: str,
        title: str,
        series: Mapping[str, Mapping[str, Sequence]],
        *,
        kind: str = "line",
        x_label: str = "",
        y_label: str = "",
        log_x: bool = False,
        log_y: bool = False,
        note: str = "",
    ) -> None:
        """Adds a plot.

        Args:
            section: Where it belongs.
            title: Its heading.
            series: Name -> {"x": ..., "y": ...} and, for intervals, {"low": ..., "high": ...}, all
                of one length. x are numbers, for bars labels. Points without a finite y are left
                out.
            kind: "line" or "bar".
            x_label: Text at the horizontal axis.
            y_label: Text at the vertical axis.
            log_x: Logarithmic horizontal axis (lines only); all x must be positive.
            log_y: Logarithmic vertical axis (lines only).
            note: Text below.

        Raises:
            ValueError: Unknown kind, lengths that differ, or values that a logarithm refuses.
        """
        if kind not in ("line", "bar"):
            raise ValueError(f"plot {title!r}: kind {kind!r} is neither 'line' nor 'bar'")
        plain = {}
        for name, values in series.items():
            columns = {key: [_plain(v) for v in values[key]] for key in values}
            if not {"x", "y"} <= columns.keys() or len({len(c) for c in columns.values()}) != 1:
                lengths = {key: len(column) for key, column in columns.items()}
                raise ValueError(f"plot {title!r}: series {name!r} has columns of {lengths}")
            for key, is_log in (("x", log_x), ("y", log_y), ("low", log_y)):
                if is_log and any(v is not None and v <= 0 for v in columns.get(key, [])):
                    raise ValueError(f"plot {title!r}: {key} of {name!r} is not positive, but log")
            plain[name] = columns
        options = {"kind": kind, "x_label": x_label, "y_label": y_label, "note": note}
        options |= {"log_x": log_x, "log_y": log_y}
        self._section(section)["plots"][title] = {"series": plain, **options}

    def add_gallery(
        self, section: str, title: str, rows: Sequence[GalleryRow], note: str = ""
    ) -> None:
        """Adds pictures with their captions; they are embedded in the page.

        Large ones are shrunk, and if they still weigh too much the last rows are left out and the
        note says so.
        """
        kept = encode_rows(rows)
        if len(kept) < len(rows):
            note = f"{note} Shown are the first {len(kept)} of {len(rows)} examples.".strip()
        self._section(section)["galleries"][title] = {"rows": kept, "note": note}

    def write(self, directory: str | os.PathLike) -> Path:
        """Writes report.json and report.html, keeping what other commands wrote there.

        Args:
            directory: Made if missing.

        Returns:
            The path of report.html.

        Raises:
            ValueError: A metric's name is also the beginning of another's, or what is there was
                written by another version.
        """
        root = Path(directory)
        parts_dir = root / "report_parts"
        parts_dir.mkdir(parents=True, exist_ok=True)
        parts = _read_parts(parts_dir)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        facts = {"written": now, "provenance": _plain(self._provenance)}
        for name, groups in self._sections.items():
            part = parts.setdefault(name, {"format": FORMAT, "name": name, "groups": {}})
            for group, content in groups.items():
                _forget_names(part["groups"], group, content)
                part["groups"][group] = facts | content
        numbers = _nested(parts)  # before anything is written: it may raise
        title = self.title or _old_title(root / "report.json")
        numbers["report"] = {
            "title": title,
            "format": FORMAT,
            "sections": {
                name: {
                    group: {key: content[key] for key in ("written", "provenance")}
                    for group, content in part["groups"].items()
                }
                for name, part in parts.items()
            },
        }
        for name in self._sections:
            text = _dump(parts[name], indent=None)
            write_whole(parts_dir / f"{_file_name(name)}.json", text)
        write_whole(root / "report.json", _dump(numbers, indent=2))
        page = root / "report.html"
        write_whole(page, render(title, list(parts.values())))
        return page

    def _section(self, name: str) -> dict:
        if not name or name.split(".")[0] == "report":
            raise ValueError(f"a section cannot be named {name!r}")
        groups = self._sections.setdefault(name, {})
        return groups.setdefault(self._group, {kind: {} for kind in _KINDS})


@dataclasses.dataclass(frozen=True)
class StoredMetric:
    """A metric that was written, with where it came from.

    Attributes:
        section: Of the report.
        name: Of the metric within the section.
        entry: Its value, n, interval, seed and settings, as in report.json.
        provenance: Facts about the run that wrote it.
    """

    section: str
    name: str
    entry: Mapping[str, Any]
    provenance: Mapping[str, Any]


def stored_metrics(directory: str | os.PathLike) -> list[StoredMetric]:
    """Every metric of a report that was written to a directory; none where there is no report.

    Raises:
        ValueError: It was written by another version.
    """
    return [
        StoredMetric(part["name"], name, entry, group["provenance"])
        for part in _read_parts(Path(directory) / "report_parts").values()
        for group in part["groups"].values()
        for name, entry in group["metrics"].items()
    ]


def metrics_of_part(part: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> metric of all groups of a stored section."""
    return {n: m for group in part["groups"].values() for n, m in group["metrics"].items()}


def _forget_names(groups: dict[str, dict], new_name: str, new: Mapping[str, Any]) -> None:
    """Takes names that a new group brings out of the other groups; empty ones go."""
    for name in [n for n in groups if n != new_name]:
        for kind in _KINDS:
            for item in new[kind]:
                groups[name][kind].pop(item, None)
        if not any(groups[name][kind] for kind in _KINDS):
            del groups[name]


def _old_title(file: Path) -> str:
    if not file.is_file():
        return "Report"
    return json.loads(file.read_text(encoding="utf-8")).get("report", {}).get("title", "Report")


def _number(value: Any) -> float | int | None:
    value = np.asarray(value).item()
    return value if isinstance(value, int) or math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Makes settings and cells JSON: NumPy scalars to Python's, the unknown to text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _nested(parts: Mapping[str, dict]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    leaves: set[tuple[str, ...]] = set()
    for section, part in parts.items():
        for name, entry in metrics_of_part(part).items():
            path = tuple(f"{section}.{name}".split("."))
            node = tree
            for depth, step in enumerate(path[:-1]):
                if path[: depth + 1] in leaves:
                    raise ValueError(
                        f"metric {'.'.join(path)} lies below {'.'.join(path[: depth + 1])}, which "
                        "is a metric itself; rename one"
                    )
                node = node.setdefault(step, {})
            if path[-1] in node:
                raise ValueError(
                    f"metric {'.'.join(path)} is also the beginning or the name of another metric; "
                    "rename one"
                )
            node[path[-1]] = entry
            leaves.add(path)
    return tree


def _read_parts(directory: Path) -> dict[str, dict]:
    parts = {}
    for path in sorted(directory.glob("*.json")):
        part = json.loads(path.read_text(encoding="utf-8"))
        if part.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {part.get('format')}, this program writes {FORMAT}; write the "
                "report to another directory, or delete that file"
            )
        parts[part["name"]] = part
    return parts


def _file_name(section: str) -> str:
    safe = re.sub(r"[^\w.-]", "_", section)
    # Two names may look alike once made safe.
    return safe if safe == section else f"{safe}-{section.encode().hex()[:24]}"


def _dump(value: Any, indent: int | None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
