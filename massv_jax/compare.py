r"""Several measured drafters in one report: the mean over seeds, and each arm against a baseline.

    python -m massv_jax.compare --records runs/a runs/b --baseline text \
        --arms text=text massv=massv_0,massv_1,massv_2 --section massv.qwen --out runs/results

`--records` are folders that `python -m massv_jax.evaluate` wrote; an arm is a name and the names of
its runs there, which differ in the seed of training. Intervals are over questions, the runs of an
arm pooled. Nothing is run again.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from massv_jax.evaluation.arms import read_lines
from massv_jax.evaluation.comparing import compare
from massv_jax.evaluation.prompts import EvaluationError


def parse_arms(words: Sequence[str]) -> dict[str, list[str]]:
    """Reads words name=RUN[,RUN...]; a name may come again.

    Raises:
      EvaluationError: a word has another form.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        runs = [run for run in rest.split(",") if run]
        if not equals or not runs or "." in name:
            raise EvaluationError(f"--arms {word!r}: write name=RUN or name=RUN,RUN; no dots")
        found.setdefault(name, []).extend(runs)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m massv_jax.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--records", nargs="+", required=True, action="extend", metavar="DIR")
    add("--arms", nargs="+", required=True, action="extend", metavar="NAME=RUN[,RUN...]")
    add("--baseline", default="", help="name of an arm")
    add("--gamma", nargs="*", type=int, default=[], help="windows to tell of; all by default")
    add("--out", required=True, help="folder of the report")
    add("--section", required=True, help="of the report; dots nest it")
    add("--note", default="", help="a remark for the page")
    add("--title", default=None, help="of the page; by default the one that is there")
    given = parser.parse_args(argv)
    try:
        compare(
            read_lines(given.records), parse_arms(given.arms), given.out, section=given.section,
            baseline=given.baseline, gammas=given.gamma, note=given.note, title=given.title,
        )  # fmt: skip
    except ValueError as error:  # of names, records or the report that is there
        sys.exit(f"error: {error}")
    print(f"wrote {pathlib.Path(given.out) / 'report.html'}", flush=True)


if __name__ == "__main__":
    main()
