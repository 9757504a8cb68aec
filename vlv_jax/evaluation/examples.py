"""What every held-out example contributed to every number, on disk, and back to numbers.

`evaluate` writes evaluated_<group>.jsonl beside the report, one JSON object an example:

    {"id": "...", ..., "scores": {"caption.rouge_l": 0.41, "caption.object.tp_pred": 3, ...}}

All corpus numbers are functions of sums of these scores, so that several runs can be compared over
the same images without running them again. A score is

    a number, whose mean is the metric of its name;
    four counts m.tp_pred, m.pred, m.tp_ref, m.ref (vlv_jax.evaluation.scorers), from which come
        m_precision, m_recall and m_f1;
    [right, asked], whose sums' ratio is the metric of its name;
    `caption.bleu`, the ten addends of BLEU, from which come caption.bleu_1 .. bleu_4.
"""

import dataclasses
import difflib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from core_jax.evaluation.bootstrap import micro_f1, ratio
from core_jax.files import write_whole
from vlv_jax.evaluation.caption_metrics import MAX_N, bleu_of_sums
from vlv_jax.evaluation.scorers import PARTS as COUNTS

BLEU = "caption.bleu"
_PAIR = "_difference."
Score = float | list[float]
# Score name -> example id -> score.
Scores = Mapping[str, Mapping[str, Score]]


class ExamplesError(ValueError):
    """Saved examples are missing, doubled or do not belong together; the message names them."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """A metric as a function of sums over examples.

    Attributes:
      ids: of the examples, sorted.
      rows: their addends [n, k].
      statistic: maps sums [..., k] to values [...].
      truth: the columns that depend on the example alone, not on what a model made of it.
    """

    ids: tuple[str, ...]
    rows: np.ndarray
    statistic: Callable[[np.ndarray], np.ndarray]
    truth: tuple[int, ...] = ()


def examples_file(group: str) -> str:
    """Name of the file that a group's examples are saved in."""
    return f"evaluated_{group.replace('.', '_')}.jsonl"


def save_examples(file: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line; the whole file or, if the program dies, none of it."""
    lines = [json.dumps(row, ensure_ascii=False, default=_plain) for row in rows]
    write_whole(file, "".join(f"{line}\n" for line in lines))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be saved")


def columns_of(names: Sequence[str], columns: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows {"id", "scores"} of ids [n] and scores [n] by name."""
    return [
        {"id": name, "scores": {k: float(v[i]) for k, v in columns.items()}}
        for i, name in enumerate(names)
    ]


def load_scores(directory: str | os.PathLike) -> dict[str, dict[str, Score]]:
    """All scores in a directory that `evaluate` wrote.

    Raises:
      ExamplesError: there are none, one is not finite, or an example has two scores of one name.
    """
    files = sorted(pathlib.Path(directory).glob("evaluated_*.jsonl"))
    scores: dict[str, dict[str, Score]] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            for name, score in row.get("scores", {}).items():
                column = scores.setdefault(name, {})
                if row["id"] in column:
                    raise ExamplesError(
                        f"{file}:{number}: {row['id']} has a second {name}; ids must be unique"
                    )
                values = score if isinstance(score, list) else [score]
                if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
                    raise ExamplesError(f"{file}:{number}: {name} of {row['id']} is {score!r}")
                column[row["id"]] = score
    if not scores:
        raise ExamplesError(
            f"{directory} has no evaluated examples with scores (evaluated_*.jsonl); run "
            "`python -m vlv_jax.evaluate` with --out there"
        )
    return scores


def measures_of(scores: Scores) -> list[str]:
    """Every metric that `measure` knows, differences of conditions left out."""
    counted = [n.removesuffix(".pred") for n in scores if n.endswith(".pred")]
    found = [f"{m}_{kind}" for m in counted for kind in ("precision", "recall", "f1")]
    if BLEU in scores:
        found += [f"{BLEU}_{k + 1}" for k in range(MAX_N)]
    taken = {f"{m}.{part}" for m in counted for part in COUNTS} | {BLEU}
    return sorted([*found, *(n for n in scores if n not in taken)])


def measure(scores: Scores, metric: str) -> Measure:
    """Finds what a metric is made of.

    Args:
      scores: from `load_scores`.
      metric: its name as in report.json, without the section: "caption.object_f1",
        "stage1.denoising_loss.vlv", "reconstruction.pixel_mse_difference.vlv_minus_none".

    Raises:
      ExamplesError: nothing of that name was saved (the nearest names are given), or the scores
        that it needs are of different examples.
    """
    prefix, pair, names = metric.partition(_PAIR)
    if pair:
        a, between, b = names.partition("_minus_")
        if between:
            return _difference(measure(scores, f"{prefix}.{a}"), measure(scores, f"{prefix}.{b}"))
    base, _, kind = metric.rpartition("_")
    if f"{base}.pred" in scores and kind in ("precision", "recall", "f1"):
        columns = [scores[f"{base}.{part}"] for part in COUNTS]
        return _of_columns(columns, metric, _OF_COUNTS[kind], truth=(COUNTS.index("ref"),))
    if base == BLEU and kind.isdigit() and 1 <= int(kind) <= MAX_N and BLEU in scores:
        order = int(kind) - 1
        return _of_lists(scores[BLEU], metric, lambda sums: bleu_of_sums(sums)[..., order])
    if metric in scores and metric != BLEU:
        column = scores[metric]
        if any(isinstance(score, list) for score in column.values()):
            share = _OF_COUNTS["precision"]
            return _of_lists(column, metric, share, truth=(1,))
        count = len(column)
        return _of_columns([column], metric, lambda sums: sums[..., 0] / count)
    known = measures_of(scores)
    near = difflib.get_close_matches(metric, known, n=3) or known
    raise ExamplesError(f"there is no saved metric {metric!r}; there are {', '.join(near)}")


_OF_COUNTS = {
    "precision": lambda sums: ratio(sums[..., 0], sums[..., 1]),
    "recall": lambda sums: ratio(sums[..., 2], sums[..., 3]),
    "f1": micro_f1,
}


def _of_columns(
    columns: Sequence[Mapping[str, Score]], metric: str, statistic, truth: tuple[int, ...] = ()
) -> Measure:
    ids = tuple(sorted(columns[0]))
    if any(set(column) != set(ids) for column in columns):
        raise ExamplesError(f"the scores of {metric} are not of the same examples")
    rows = np.array([[column[i] for column in columns] for i in ids], np.float64)
    return Measure(ids, rows, statistic, truth)


def _of_lists(
    column: Mapping[str, Score], metric: str, statistic, truth: tuple[int, ...] = ()
) -> Measure:
    ids = tuple(sorted(column))
    if len({np.shape(column[i]) for i in ids}) != 1:
        raise ExamplesError(f"the scores of {metric} have different lengths")
    return Measure(ids, np.array([column[i] for i in ids], np.float64), statistic, truth)


def _difference(a: Measure, b: Measure) -> Measure:
    if a.ids != b.ids:
        raise ExamplesError("a paired difference needs two conditions on the same examples")
    width = a.rows.shape[1]
    return Measure(
        a.ids, np.concatenate([a.rows, b.rows], axis=1),
        lambda sums: a.statistic(sums[..., :width]) - b.statistic(sums[..., width:]),
    )  # fmt: skip
