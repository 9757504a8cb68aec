"""Everything that `python -m vlv_jax.evaluate` measures, in one report."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from core_jax.train.run_record import versions
from vlv_jax.evaluation.captions import (
    FILE,
    CaptionRecord,
    report_captions,
    save_captions,
    write_captions,
)
from vlv_jax.evaluation.heldout import Subject
from vlv_jax.evaluation.reconstruction import redraw_examples, report_reconstruction
from vlv_jax.evaluation.report import Report
from vlv_jax.experiment import Experiment
from vlv_jax.inference import load_pair
from vlv_jax.workdir import WorkdirError, experiment_to_use, is_export, newest_step

PARTS = ("captions", "reconstruction", "denoising", "vqa")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure.

    Attributes:
      parts: of `PARTS`.
      section: of the report; dots nest it.
      title: of the page.
      answerer: hub directory of a language model that answers questions from captions; empty:
        none are asked.
      instruction: first paragraph of its prompts; may be empty.
    """

    parts: Sequence[str] = PARTS
    section: str = "vlv"
    title: str = "VLV"
    answerer: str = ""
    instruction: str = ""

    def __post_init__(self):
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or not self.parts:
            raise ValueError(f"parts {unknown} are not among {', '.join(PARTS)}")


def load_subject(path: pathlib.Path, given: Experiment) -> Subject:
    """A run, or an export of one, with the given config's evaluation and sampling.

    Raises:
      WorkdirError: neither, or the config has no evaluation part.
    """
    if given.evaluation is None:
        raise WorkdirError("the config has no `evaluation` part, so nothing says on which images")
    if is_export(path):
        autoencoder, captioner = load_pair(path)
        experiment = given
    else:
        experiment = experiment_to_use(path, given)
        autoencoder, captioner = load_pair(path, experiment=experiment)
    autoencoder.sampling = given.sampling
    if captioner is not None:
        captioner.sampling = given.sampling
    return Subject(autoencoder, captioner, experiment)


def evaluate(
    subject: Subject,
    out: pathlib.Path,
    request: Request,
    *,
    provenance: dict[str, Any],
    say: Callable[[str], None] = print,
) -> Report:
    """Measures what was asked; writes report.json, report.html and evaluated_captions.jsonl.

    The report is written after every part, so that an interrupted evaluation leaves what it had.

    Args:
      subject: from `load_subject`.
      out: the folder.
      request: what to measure.
      provenance: facts for the report.
      say: gets a line for every part, and for everything that is left out.
    """
    out.mkdir(parents=True, exist_ok=True)
    report = Report(request.title, provenance)
    records: list[CaptionRecord] = []
    for part in PARTS:
        if part not in request.parts:
            continue
        started = time.perf_counter()
        skipped = _PARTS[part](report, subject, request, out, records)
        for line in skipped:
            say(f"left out: {line}")
        report.write(out)
        say(f"{part}: {time.perf_counter() - started:.1f} s")
    return report


def provenance_of(path: pathlib.Path, subject: Subject) -> dict[str, Any]:
    """What a reader needs to repeat the evaluation."""
    return {
        "workdir": str(path),
        "step": newest_step(path),
        "versions": versions(),
        "config": dataclasses.asdict(subject.experiment),
    }


def _captions(report, subject: Subject, request: Request, out, records) -> list[str]:
    if subject.captioner is None:
        return ["captions: a stage-1 run writes none"]
    count = subject.evaluation.num_captions
    if not count:
        return ["captions: evaluation.num_captions is 0"]
    records += write_captions(subject, count)
    save_captions(out / FILE, records)
    return report_captions(report, request.section, subject, records)


def _reconstruction(report, subject: Subject, request: Request, out, records) -> list[str]:
    del out
    count = subject.evaluation.num_redrawn
    if not count:
        return ["reconstruction: evaluation.num_redrawn is 0"]
    drawn = redraw_examples(subject, count)
    return report_reconstruction(report, request.section, subject, drawn, records)


def _denoising(report, subject: Subject, request: Request, out, records) -> list[str]:
    del out, records
    from vlv_jax.evaluation.denoising import (
        compare_conditions,
        encode_examples,
        report_denoising,
    )

    count = subject.evaluation.num_denoising
    if not count:
        return ["denoising comparison: evaluation.num_denoising is 0"]
    losses = compare_conditions(subject, encode_examples(subject, count))
    report_denoising(report, request.section, subject, losses)
    return []


def _vqa(report, subject: Subject, request: Request, out, records) -> list[str]:
    del out
    if not request.answerer:
        return ["questions: no language model to answer them (--answerer)"]
    if not records:
        return ["questions: there are no captions to answer from"]
    from vlv_jax.evaluation.answering import report_questions

    return report_questions(report, subject, request, records)


_PARTS = {
    "captions": _captions, "reconstruction": _reconstruction, "denoising": _denoising,
    "vqa": _vqa,
}  # fmt: skip
