r"""Several evaluated runs in one report: ablations against a baseline, or the mean over seeds.

    python -m vlv_jax.compare --arms full=runs/a0,runs/a1,runs/a2 no_stage1=runs/b0 \
        --baseline full --metric caption.object_f1 --section vlv.ablations.T7 --out runs/results

An arm is a name and the directories that `python -m vlv_jax.evaluate` wrote for its seeds. Under
the section are then, for every metric M,

    M.<arm>                                   mean over its runs, interval over images
    M_difference.<arm>_minus_<baseline>       paired over the same images

with a table and a plot. One arm without --baseline is the mean over seeds; its numbers are M
itself (`--arms vlv=runs/a0,runs/a1,runs/a2 --metric all --section vlv`). Nothing is run again.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from vlv_jax.evaluation.arm_report import compare, result_line
from vlv_jax.evaluation.arms import ArmsError, load_arm


def parse_arms(words: Sequence[str]) -> dict[str, list[str]]:
    """Reads words name=DIR[,DIR...] into directories by name; a name may come again.

    Raises:
      ArmsError: a word has another form.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        name, equals, directories = word.partition("=")
        paths = [path for path in directories.split(",") if path]
        if not equals or not paths:
            raise ArmsError(f"--arms {word!r} must have the form name=DIR or name=DIR,DIR,...")
        found.setdefault(name, []).extend(paths)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m vlv_jax.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--arms", nargs="+", required=True, action="extend", metavar="NAME=DIR[,DIR...]")
    add("--baseline", default="", help="name of an arm")
    add("--metric", nargs="+", required=True, action="extend", help="names, or all")
    add("--out", required=True, help="folder of the report")
    add("--section", required=True, help="of the report; dots nest it")
    add("--note", default="", help="a remark for the page")
    add("--title", default=None, help="of the page; by default the one that is there")
    add("--bootstrap_samples", type=int, default=2000)
    add("--seed", type=int, default=0, help="of the intervals")
    given = parser.parse_args(argv)
    metrics = [name for word in given.metric for name in word.split(",") if name]
    try:
        arms = [load_arm(name, paths) for name, paths in parse_arms(given.arms).items()]
        results = compare(
            arms, metrics, given.out, section=given.section, baseline=given.baseline,
            note=given.note, title=given.title, seed=given.seed,
            num_resamples=given.bootstrap_samples,
        )  # fmt: skip
    except ValueError as error:  # of names, runs or the report that is there
        sys.exit(f"error: {error}")
    for metric, found in results.items():
        for arm in found:
            print(result_line(metric, arm, given.baseline), flush=True)
    print(f"wrote {pathlib.Path(given.out) / 'report.html'}", flush=True)


if __name__ == "__main__":
    main()
