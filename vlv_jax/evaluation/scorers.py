"""Scorers that a config names: how a world with ground truth counts what a caption got right.

A scorer is a function `scorer(references, captions) -> list of dicts of numbers`, one dict an
example. It is named by its import path, "package.module:function", so that this package depends on
none. Counts whose names end so belong together as one metric m:

    m.tp_pred  of the things that the caption says, how many are true
    m.pred     how many things it says
    m.tp_ref   of the things that are true, how many it says
    m.ref      how many are true

and become m_precision = sum(tp_pred) / sum(pred), m_recall = sum(tp_ref) / sum(ref) and m_f1 over
the corpus. Every other number is averaged over examples under its own name.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from core_jax.evaluation.bootstrap import (
    Estimate,
    bootstrap_f1,
    bootstrap_mean,
    bootstrap_ratio,
)

Counts = Mapping[str, float]
Scorer = Callable[[Sequence[Any], Sequence[str]], Sequence[Counts]]
PARTS = ("tp_pred", "pred", "tp_ref", "ref")


def load_scorer(path: str) -> Scorer:
    """Returns the function named by "package.module:function".

    Raises:
        ValueError: The path has another form, the module has no such name, or it is no function.
        ImportError: The module is not there.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name.isidentifier():
        raise ValueError(f"scorer {path!r} must have the form 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"scorer {path!r}: cannot import {module_name!r} ({error}); is it installed, or is the "
            "config's scorer misspelt?"
        ) from error
    if not hasattr(module, name):
        public = ", ".join(n for n in sorted(vars(module)) if not n.startswith("_"))
        raise ValueError(f"scorer {path!r}: {module_name} has no {name!r}; it has {public}")
    scorer = getattr(module, name)
    if not callable(scorer):
        raise ValueError(f"scorer {path!r} is a {type(scorer).__name__}, not a function")
    return cast(Scorer, scorer)


def run_scorer(
    scorer: Scorer, references: Sequence[Any], captions: Sequence[str]
) -> list[dict[str, float]]:
    """Calls a scorer and checks that it kept its contract.

    Args:
        scorer: From `load_scorer`.
        references: The ground truth of each example, in the scorer's own form.
        captions: One an example.

    Returns:
        The counts of each example; all have the same names.

    Raises:
        ValueError: Lengths differ, names differ between examples, a count is not a finite number,
            or a metric lacks one of its four counts.
    """
    if len(references) != len(captions) or not captions:
        raise ValueError(
            f"{len(references)} references and {len(captions)} captions; they must be as many, and "
            "at least one"
        )
    rows = [dict(row) for row in scorer(references, captions)]
    if len(rows) != len(captions):
        raise ValueError(f"the scorer returned {len(rows)} examples for {len(captions)} captions")
    names = set(rows[0])
    for i, row in enumerate(rows):
        if set(row) != names:
            differ = ", ".join(sorted(names ^ set(row)))
            raise ValueError(f"the scorer's example {i} differs from example 0 in {differ}")
        for name, value in row.items():
            if not isinstance(value, int | float | np.number) or not math.isfinite(value):
                raise ValueError(f"the scorer's {name} of example {i} is {value!r}, not a number")
    _metrics(names)
    return rows


def _metrics(names: set[str]) -> tuple[list[str], list[str]]:
    """Splits names into metrics of four counts and plain numbers."""
    counted = sorted({n.rpartition(".")[0] for n in names if n.rpartition(".")[2] in PARTS})
    missing = [f"{m}.{part}" for m in counted for part in PARTS if f"{m}.{part}" not in names]
    if missing:
        raise ValueError(f"the scorer's counts lack {', '.join(missing)}")
    plain = sorted(n for n in names if n.rpartition(".")[2] not in PARTS)
    return counted, plain


def count_rows(counts: Sequence[Counts], metric: str) -> np.ndarray:
    """Returns the counts of one metric, [n, 4]: rows for `bootstrap.micro_f1`."""
    return np.array([[row[f"{metric}.{part}"] for part in PARTS] for row in counts], np.float64)


def aggregate(counts: Sequence[Counts], **options) -> dict[str, Estimate]:
    """Returns corpus values with bootstrap intervals over examples.

    Args:
        counts: From `run_scorer`.
        **options: As for `bootstrap.bootstrap_sums`.

    Returns:
        m_precision, m_recall and m_f1 of every metric m, and means of the plain numbers.
    """
    counted, plain = _metrics(set(counts[0]))
    result = {}
    for metric in counted:
        rows = count_rows(counts, metric)
        result[f"{metric}_precision"] = bootstrap_ratio(rows[:, 0], rows[:, 1], **options)
        result[f"{metric}_recall"] = bootstrap_ratio(rows[:, 2], rows[:, 3], **options)
        result[f"{metric}_f1"] = bootstrap_f1(rows, **options)
    for name in plain:
        result[name] = bootstrap_mean([row[name] for row in counts], **options)
    return result
