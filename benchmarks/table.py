"""Writes the figures in docs/benchmarks.md from the JSON results.

    python -m benchmarks.table

Replaces what stands between the two markers in that file; everything else is written by hand.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.alternate import OURS, PEER, QUIET, RESULTS, most_busy
from benchmarks.provenance import ROOT
from core_jax.evaluation.document import replace_part

DOCUMENT = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
NOTHING = "Nothing has been measured yet.\n"


def read_results(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Every result in a folder, by name."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def section(title: str, results: Sequence[Mapping[str, Any]]) -> str:
    """The tables of one kind of machine."""
    lines = [f"### {title}", ""]
    compared = [r for r in results if any("ratio" in m for m in r["measures"].values())]
    if compared:
        lines += [
            "| benchmark | measure | this project, s | peer, s | peer time / our time | others |",
            "|---|---|---|---|---|---|",
            *(row for r in compared for row in _compared_rows(r)),
            "",
        ]
    alone = [r for r in results if any("ratio" not in m for m in r["measures"].values())]
    if alone:
        lines += ["| benchmark | measure | seconds | others |", "|---|---|---|---|"]
        lines += [row for r in alone for row in _alone_rows(r)]
        lines.append("")
    for result in results:
        facts = {k: v for k, v in result["facts"].items() if isinstance(v, float)}
        if facts:
            lines += [f"`{result['name']}`: " + ", ".join(f"{k} {_number(v)}"
                      for k, v in facts.items()) + ".", ""]  # fmt: skip
    return "\n".join([*lines, *_machines(results), ""])


def _compared_rows(result: Mapping[str, Any]) -> list[str]:
    return [
        f"| `{result['name']}` | {name} | {_times(m[OURS])} | {_times(m[PEER])} | "
        f"**{m['ratio']['median']:.2f}** ({m['ratio']['min']:.2f} to {m['ratio']['max']:.2f}) | "
        f"{_others(result)} |"
        for name, m in result["measures"].items()
        if "ratio" in m
    ]


def _alone_rows(result: Mapping[str, Any]) -> list[str]:
    return [
        f"| `{result['name']}` | {name} | {_times(m[OURS])} | {_others(result)} |"
        for name, m in result["measures"].items()
        if "ratio" not in m
    ]


def _times(summary: Mapping[str, float]) -> str:
    low, middle, high = (_number(summary[k]) for k in ("min", "median", "max"))
    return f"{low} / **{middle}** / {high}"


def _number(x: float) -> str:
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def _others(result: Mapping[str, Any]) -> str:
    """Cores that others kept busy, which should be none; a busy machine is pointed at."""
    busy = most_busy(result)
    if busy is None:
        return "unknown"
    return f"{busy:.2f}" if busy <= QUIET else f"{busy:.2f}, NOT quiet"


def _machines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the numbers come from; one line for each different machine and commit."""
    seen: dict[str, list[str]] = {}
    for result in results:
        p = result["provenance"]
        versions = ", ".join(
            f"{k} {p['versions'][k]}"
            for k in ("jax", "torch", "transformers", "diffusers")
            if k in p["versions"]
        )
        device = result["facts"].get("device", f"{p['cpu']}, {p['cpus']} cores")
        line = f"{device}; {versions}; commit {p['commit'][:12]}; {p['time'][:10]}"
        seen.setdefault(line, []).append(result["name"])
    if len(seen) == 1:
        return [f"{next(iter(seen))}."]
    return [f"- {line}: {', '.join(f'`{n}`' for n in names)}" for line, names in seen.items()]


def figures(root: pathlib.Path) -> str:
    """All tables, or a sentence if there is nothing to show."""
    titles = {"cpu": "CPU", "gpu": "GPU"}
    found = {title: read_results(root / folder) for folder, title in titles.items()}
    parts = [section(title, results) for title, results in found.items() if results]
    return "\n".join(parts) if parts else NOTHING


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--document", type=pathlib.Path, default=DOCUMENT)
    arguments = parser.parse_args(argv)
    text = arguments.document.read_text()
    new = replace_part(text, BEGIN, END, figures(arguments.results))
    arguments.document.write_text(new)
    print(f"{arguments.document} has the figures of {arguments.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
