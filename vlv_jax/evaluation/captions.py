"""Captions of held-out images, against their true captions and their ground truth."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlv_jax.evaluation.bootstrap import bootstrap_mean
from vlv_jax.evaluation.caption_metrics import score_captions
from vlv_jax.evaluation.heldout import Subject, heldout_batches, true_captions
from vlv_jax.evaluation.report import Report
from vlv_jax.evaluation.scorers import aggregate, load_scorer, run_scorer
from vlv_jax.inference import Caption

FILE = "evaluated_captions.jsonl"


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
    captioner, records = subject.captioner, []
    if captioner is None:
        raise ValueError("there is no captioner: this is a stage-1 run")
    for batch in heldout_batches(subject, count, keep=("florence_image",)):
        written = captioner.caption_views(batch["florence_image"], rows=batch["index"])
        records += [
            CaptionRecord(name, caption, true_captions(text, extras), extras)
            for name, mask, caption, text, extras in zip(
                batch["ids"], batch["mask"], written, batch["caption"], batch["extras"],
                strict=True,
            )
            if mask
        ]  # fmt: skip
    return records


def save_captions(file: pathlib.Path, records: Sequence[CaptionRecord]) -> None:
    """One JSON object a line, so that other tools can score the same captions."""
    lines = [
        json.dumps({"id": r.id, **dataclasses.asdict(r.caption), "references": list(r.references)},
                   ensure_ascii=False)
        for r in records
    ]  # fmt: skip
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def caption_settings(subject: Subject) -> dict[str, Any]:
    """What every number about captions depends on."""
    names = ("num_beams", "temperature", "top_k", "top_p", "max_new_tokens", "seed")
    sampling = subject.autoencoder.sampling
    return {f"sampling.{name}": getattr(sampling, name) for name in names} | {
        "bootstrap_samples": subject.evaluation.bootstrap_samples
    }


def report_captions(
    report: Report, section: str, subject: Subject, records: Sequence[CaptionRecord]
) -> list[str]:
    """Adds `caption.*` to a report.

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
    texts = [r.caption.text for r in records]
    if all(r.references for r in records):
        scores = score_captions(texts, [list(r.references) for r in records])
        estimates |= scores.estimates(**options)
    else:
        skipped.append("BLEU, ROUGE-L, CIDEr-D: some held-out images have no caption")
    counts = score_records(subject, records, skipped)
    if counts is not None:
        settings["scorer"] = subject.evaluation.scorer
        estimates |= aggregate(counts, **options)
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


def score_notes(counts: Sequence[Mapping[str, float]]) -> list[str]:
    """What the scorer says of each caption, in words for a gallery."""
    names = [n.removesuffix(".tp_pred") for n in counts[0] if n.endswith(".tp_pred")]

    def note(row: Mapping[str, float]) -> str:
        parts = []
        for name in names:
            said, wrong = row[f"{name}.pred"], row[f"{name}.pred"] - row[f"{name}.tp_pred"]
            missed = row[f"{name}.ref"] - row[f"{name}.tp_ref"]
            if wrong or missed:
                parts.append(f"{name}: {wrong:g} of {said:g} wrong, {missed:g} missed")
        return "; ".join(parts) or "all right"

    return [note(row) for row in counts]


def mean_tokens(records: Sequence[CaptionRecord]) -> float:
    """Mean length in tokens."""
    return float(np.mean([r.caption.num_tokens for r in records]))
