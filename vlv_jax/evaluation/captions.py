"""Captions of held-out images, against their true captions and their ground truth."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from core_jax.evaluation.bootstrap import bootstrap_mean
from core_jax.evaluation.report import Report
from vlv_jax.evaluation.caption_metrics import CaptionScores, score_captions
from vlv_jax.evaluation.examples import BLEU, examples_file, save_examples
from vlv_jax.evaluation.heldout import Subject, collect, true_captions
from vlv_jax.evaluation.scorers import aggregate, load_scorer, run_scorer
from vlv_jax.inference import Caption

GROUP = "captions"
# Metrics of a scorer whose counts are shown with every caption, if it has them.
_SHOWN = ("object", "relation")


@dataclasses.dataclass(frozen=True)
class CaptionRecord:
    """A caption and what it should have said.

    Attributes:
      id: of the example.
      caption: what was written.
      references: true captions; may be none.
      extras: what else the source knows of the example.
    """

    id: str
    caption: Caption
    references: tuple[str, ...]
    extras: Mapping[str, Any]


def write_captions(subject: Subject, count: int) -> list[CaptionRecord]:
    """Captions the first `count` held-out images."""
    captioner = subject.captioner
    if captioner is None:
        raise ValueError("there is no captioner: this is a stage-1 run")

    def records(batch: Mapping[str, Any]) -> dict[str, list[CaptionRecord]]:
        written = captioner.caption_views(batch["florence_image"], rows=batch["index"])
        made = [
            CaptionRecord(name, caption, true_captions(text, extras), extras)
            for name, caption, text, extras in zip(
                batch["ids"], written, batch["caption"], batch["extras"], strict=True
            )
        ]  # fmt: skip
        return {"records": made}

    return collect(subject, count, records, keep=("florence_image",))["records"]


def save_captions(
    out: pathlib.Path,
    records: Sequence[CaptionRecord],
    texts: CaptionScores | None = None,
    counts: Sequence[Mapping[str, float]] | None = None,
) -> None:
    """Saves captions with what each contributes to the metrics (vlv_jax.evaluation.examples).

    Args:
      out: the folder.
      records: the captions.
      texts: their scores against true captions.
      counts: those of a scorer.
    """
    rows = []
    for i, r in enumerate(records):
        scores: dict[str, Any] = {
            "caption.finished": float(r.caption.finished), "caption.tokens": r.caption.num_tokens,
        }  # fmt: skip
        if texts is not None:
            for name in ("rouge_l", "cider_d"):
                scores[f"caption.{name}"] = float(texts.per_example[name][i])
            scores[BLEU] = texts.bleu_rows[i].tolist()
        if counts is not None:
            scores |= {f"caption.{name}": value for name, value in counts[i].items()}
        rows.append({"id": r.id, **dataclasses.asdict(r.caption),
                     "references": list(r.references), "scores": scores})  # fmt: skip
    save_examples(out / examples_file(GROUP), rows)


def caption_settings(subject: Subject) -> dict[str, Any]:
    """What every number about captions depends on."""
    names = ("num_beams", "temperature", "top_k", "top_p", "max_new_tokens", "seed")
    sampling = subject.autoencoder.sampling
    return {f"sampling.{name}": getattr(sampling, name) for name in names} | {
        "bootstrap_samples": subject.evaluation.bootstrap_samples
    }


def report_captions(
    report: Report,
    section: str,
    subject: Subject,
    records: Sequence[CaptionRecord],
    out: pathlib.Path,
) -> list[str]:
    """Adds `caption.*` to a report, and saves the captions with their scores in `out`.

    BLEU, ROUGE-L and CIDEr-D where every image has a true caption; the config's scorer where
    every example's extras have `reference_key`; always how many captions ended by themselves and
    their length in tokens.

    Returns:
      What was left out, and why, a line each.
    """
    options, settings = subject.bootstrap, caption_settings(subject)
    skipped: list[str] = []
    estimates = {
        "finished": bootstrap_mean([r.caption.finished for r in records], **options),
        "tokens": bootstrap_mean([r.caption.num_tokens for r in records], **options),
    }
    scores = None
    if all(r.references for r in records):
        texts = [r.caption.text for r in records]
        scores = score_captions(texts, [list(r.references) for r in records])
        estimates |= scores.estimates(**options)
    else:
        skipped.append("BLEU, ROUGE-L, CIDEr-D: some held-out images have no caption")
    counts = score_records(subject, records, skipped)
    if counts is not None:
        settings["scorer"] = subject.evaluation.scorer
        estimates |= aggregate(counts, **options)
    save_captions(out, records, scores, counts)
    for name, estimate in estimates.items():
        report.add_metric(section, f"caption.{name}", estimate, settings=settings)
    f1 = {n.removesuffix("_f1"): e for n, e in estimates.items() if n.endswith("_f1")}
    if f1:
        columns = {"x": list(f1), "y": [e.value for e in f1.values()],
                   "low": [e.low for e in f1.values()],
                   "high": [e.high for e in f1.values()]}  # fmt: skip
        report.add_plot(
            section, "What captions get right (F1)", {"f1": columns}, kind="bar",
            y_label="F1", note="Bars end at the value; lines are 95 % bootstrap intervals.",
        )  # fmt: skip
    return skipped


def score_records(
    subject: Subject, records: Sequence[CaptionRecord], skipped: list[str]
) -> list[dict[str, float]] | None:
    """The scorer's counts of each caption; None where it cannot be used, with a line why."""
    config = subject.evaluation
    if not config.scorer:
        skipped.append("scorer: the config names none (evaluation.scorer)")
        return None
    key = config.reference_key
    missing = [r.id for r in records if key not in r.extras]
    if missing:
        skipped.append(
            f"scorer: {len(missing)} examples have no {key!r} (evaluation.reference_key), such as "
            f"{missing[0]}"
        )
        return None
    scorer = load_scorer(config.scorer)
    return run_scorer(scorer, [r.extras[key] for r in records], [r.caption.text for r in records])


def verdict(row: Mapping[str, float]) -> dict[str, bool]:
    """What the scorer says of one caption: "object 2 of 3" -> whether all is right.

    The share is of what was said or of what there was to say, whichever is more.
    """
    names = [n.removesuffix(".pred") for n in row if n.endswith(".pred")]
    found = {}
    for name in [n for n in _SHOWN if n in names] or names[:2]:
        right, wanted = row[f"{name}.tp_pred"], max(row[f"{name}.pred"], row[f"{name}.ref"])
        found[f"{name} {right:g} of {wanted:g}"] = _is_right(row, name)
    return found


def score_note(row: Mapping[str, float]) -> str:
    """What the scorer finds wrong with one caption, in words."""
    parts = []
    for name in [n.removesuffix(".pred") for n in row if n.endswith(".pred")]:
        if not _is_right(row, name):
            said, wrong = row[f"{name}.pred"], row[f"{name}.pred"] - row[f"{name}.tp_pred"]
            missed = row[f"{name}.ref"] - row[f"{name}.tp_ref"]
            parts.append(f"{name}: {wrong:g} of {said:g} wrong, {missed:g} missed")
    return "; ".join(parts) or "all right"


def _is_right(row: Mapping[str, float], name: str) -> bool:
    return (
        row[f"{name}.tp_pred"] == row[f"{name}.pred"]
        and row[f"{name}.tp_ref"] == row[f"{name}.ref"]
    )
