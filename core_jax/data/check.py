"""A look at a source before training on it: what is in it, and what would be refused.

    python -m core_jax.data.check --from ~/pictures [--sample 1000] [--header-only] [--json FILE]

The exit status is 1 when more than --max-bad-fraction of the examples is unusable.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from core_jax.data.arguments import add_source_arguments, spec_from_arguments
from core_jax.data.images import BadImage, ImageLimits, decode_image, inspect_header
from core_jax.data.sources import Source, clean_text, open_source

SIDES = (0, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096)


def check_source(
    source: Source,
    *,
    limits: ImageLimits | None = None,
    sample: int | None = None,
    header_only: bool = False,
    num_threads: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Reads all examples, or a seeded sample of them.

    Returns:
        JSON-like: examples, checked, bad (number), reasons ({reason: number}), bad_ids ({id:
        reason}, the first 1000), duplicate_ids, formats, modes, shorter_side (histogram, lower
        edge in pixels: number), captions (number with one, mean and largest length in characters).
    """
    limits = limits or ImageLimits()
    indices: Any = range(len(source))
    if sample is not None and sample < len(source):
        rng = np.random.default_rng(seed)
        indices = np.sort(rng.choice(len(source), sample, replace=False)).tolist()
    reasons, formats, modes, sides = (collections.Counter() for _ in range(4))
    bad_ids: dict[str, str] = {}
    ids: collections.Counter[str] = collections.Counter()
    lengths: list[int] = []

    def look(index: int) -> Any:
        example = source[index]
        try:
            data = example.encoded_image(limits)
            header = inspect_header(data, limits)
            if not header_only:
                decode_image(data, limits)
        except BadImage as error:
            return example, None, error.reason
        return example, header, None

    with concurrent.futures.ThreadPoolExecutor(max(1, num_threads)) as pool:
        for start in range(0, len(indices), 256):  # bounds what is in memory
            for example, header, reason in pool.map(look, indices[start : start + 256]):
                ids[example.id] += 1
                if example.caption:
                    lengths.append(len(example.caption))
                if reason is not None:
                    reasons[str(reason)] += 1
                    if len(bad_ids) < 1000:
                        bad_ids[example.id] = str(reason)
                    continue
                formats[header.format] += 1
                modes[header.mode] += 1
                shorter = min(header.width, header.height)
                sides[max(edge for edge in SIDES if edge <= shorter)] += 1
    return {
        "examples": len(source),
        "left_out": getattr(source, "left_out", 0),
        "checked": len(indices),
        "decoded": not header_only,
        "bad": sum(reasons.values()),
        "reasons": dict(reasons.most_common()),
        "bad_ids": bad_ids,
        "duplicate_ids": [key for key, n in ids.items() if n > 1][:1000],
        "formats": dict(formats.most_common()),
        "modes": dict(modes.most_common()),
        "shorter_side": {str(edge): sides[edge] for edge in SIDES if sides[edge]},
        "captions": {
            "count": len(lengths),
            "mean_characters": float(np.mean(lengths)) if lengths else 0.0,
            "max_characters": max(lengths, default=0),
        },
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    checked = max(1, report["checked"])
    lines = [
        f"examples       {report['examples']} (checked {report['checked']}, "
        f"{'pixels decoded' if report['decoded'] else 'headers only'})",
        f"unusable       {report['bad']} ({100 * report['bad'] / checked:.2f} %)",
    ]
    if report["left_out"]:
        lines.append(f"left out       {report['left_out']} images that are further fields")
    lines += [f"  {reason:<17}{n}" for reason, n in report["reasons"].items()]
    lines += [f"    {key}: {reason}" for key, reason in list(report["bad_ids"].items())[:20]]
    for title in ("formats", "modes"):
        counts = ", ".join(f"{key} {n}" for key, n in report[title].items())
        lines.append(f"{title:<15}{counts}")
    lines.append("shorter side   (pixels, from this size up)")
    largest = max(report["shorter_side"].values(), default=1)
    for edge, n in report["shorter_side"].items():
        lines.append(f"  {edge:>6} {n:>9} {'#' * max(1, round(40 * n / largest))}")
    captions = report["captions"]
    lines.append(
        f"captions       {captions['count']} of {report['checked']}, "
        f"{captions['mean_characters']:.0f} characters on average, "
        f"{captions['max_characters']} at most"
    )
    if report["duplicate_ids"]:
        lines.append(f"duplicate ids  {report['duplicate_ids'][:10]}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m core_jax.data.check", description=__doc__)
    add_source_arguments(parser)
    parser.add_argument("--sample", type=int, help="look at this many, chosen at random")
    parser.add_argument("--header-only", action="store_true", help="do not decode pixels")
    parser.add_argument("--max-bad-fraction", type=float, default=0.05)
    parser.add_argument("--num-threads", type=int, default=8)
    parser.add_argument("--json", help="write the report to this file too")
    arguments = parser.parse_args(argv)
    try:
        source = open_source(spec_from_arguments(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = check_source(
        source,
        sample=arguments.sample,
        header_only=arguments.header_only,
        num_threads=arguments.num_threads,
    )
    print(clean_text(format_report(report)))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1))
    return int(report["bad"] > arguments.max_bad_fraction * report["checked"])


if __name__ == "__main__":
    sys.exit(main())
