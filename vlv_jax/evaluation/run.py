"""Everything that `python -m vlv_jax.evaluate` measures, in one report."""

import dataclasses
import difflib
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from core_jax.evaluation.provenance import command_facts, from_here
from core_jax.evaluation.report import Report
from core_jax.train.run_record import versions
from core_jax.train.workdir import newest_step
from vlv_jax.evaluation.answering import report_questions
from vlv_jax.evaluation.captions import CaptionRecord, report_captions, write_captions
from vlv_jax.evaluation.denoising import group_of, report_denoising
from vlv_jax.evaluation.heldout import Subject
from vlv_jax.evaluation.reconstruction import redraw_examples, report_reconstruction
from vlv_jax.evaluation.scorers import load_scorer
from vlv_jax.experiment import Experiment
from vlv_jax.inference import Autoencoder, Captioner, load_pair
from vlv_jax.workdir import (
    WorkdirError,
    experiment_to_use,
    exported_model,
    is_export,
)

PARTS = ("captions", "reconstruction", "denoising", "vqa")
_NEED_DECODER = {"reconstruction", "denoising"}
_NEED_LANGUAGE_MODEL = {"captions", "vqa"}


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
        problem = problem_with_parts(self.parts)
        if problem:
            raise ValueError(problem)


def problem_with_parts(parts: Sequence[str]) -> str:
    """What is wrong with a choice of parts; empty if nothing is."""
    known = ", ".join(PARTS)
    for part in parts:
        if part not in PARTS:
            near = difflib.get_close_matches(part, PARTS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            return f"there is no part {part!r}; {hint}(known: {known})"
    return "" if parts else f"name at least one part of {known}"


def load_subject(path: pathlib.Path, given: Experiment, parts: Sequence[str] = PARTS) -> Subject:
    """A run, or an export of one, with the given config's evaluation and sampling.

    Args:
      path: the working directory of a run, or an exported directory.
      given: the config; what the run itself is comes from the run. Precision and execution are
        the config's, and for an export its limits of images.
      parts: what will be measured; networks that none of it needs are not loaded.

    Raises:
      WorkdirError: neither a run nor an export, the config names no held-out images, or captions
        are all that is asked of a run of stage 1.
    """
    if given.evaluation is None:
        raise WorkdirError("the config has no `evaluation` part, so nothing says on which images")
    if not given.evaluation.has_source:
        raise WorkdirError(
            "evaluation.source names no images: give the held-out ones, with "
            "--config.evaluation.source.path=HELD_OUT (docs/data.md says what a source may be)"
        )
    if is_export(path):
        model = exported_model(path, given.model)
        stage = 2 if model.language_model else 1
        used = experiment = dataclasses.replace(given, stage=stage, model=model)
    else:
        used = experiment = experiment_to_use(path, given)
    if not _NEED_DECODER & set(parts):
        captioner = Captioner.from_pretrained(path, experiment=used)
        fields = {f.name: getattr(captioner, f.name) for f in dataclasses.fields(captioner)}
        autoencoder = Autoencoder(**fields)
    elif not _NEED_LANGUAGE_MODEL & set(parts):
        autoencoder, captioner = Autoencoder.from_pretrained(path, experiment=used), None
    else:
        autoencoder, captioner = load_pair(path, experiment=used)
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
    """Measures what was asked; writes report.json, report.html and evaluated_*.jsonl.

    The report is written after every part, so that an interrupted evaluation leaves what it had.

    Args:
      subject: from `load_subject`.
      out: the folder.
      request: what to measure.
      provenance: facts for the report.
      say: gets a line for every part, and for everything that is left out.
    """
    if "captions" in request.parts and subject.captioner is not None:
        check_scorer(subject)  # before anything slow
    out.mkdir(parents=True, exist_ok=True)
    job = _Job(Report(request.title, provenance), subject, request, out)
    for part in PARTS:
        if part not in request.parts:
            continue
        started = time.perf_counter()
        job.report.begin_group(part)
        for line in _PARTS[part](job):
            say(f"left out: {line}")
        job.report.write(out)
        say(f"{part}: {time.perf_counter() - started:.1f} s")
    return job.report


def check_scorer(subject: Subject) -> None:
    """Finds the config's scorer.

    Raises:
      WorkdirError: it cannot be imported, or is none.
    """
    path = subject.evaluation.scorer
    try:
        if path:
            load_scorer(path)
    except (ValueError, ImportError) as error:
        raise WorkdirError(f"evaluation.scorer: {error}") from error


def provenance_of(path: pathlib.Path, subject: Subject) -> dict[str, Any]:
    """What a reader needs to repeat the evaluation."""
    facts = command_facts() | {
        "workdir": str(path),
        "step": newest_step(path),
        "versions": versions(),
        "config": dataclasses.asdict(subject.experiment),
    }
    return from_here(facts)


@dataclasses.dataclass
class _Job:
    """What the parts of one evaluation share."""

    report: Report
    subject: Subject
    request: Request
    out: pathlib.Path
    records: list[CaptionRecord] = dataclasses.field(default_factory=list)

    def captions(self) -> list[CaptionRecord]:
        """Captions of the held-out images, written when first needed."""
        if not self.records:
            self.records = write_captions(self.subject, self.subject.evaluation.num_captions)
        return self.records

    @property
    def no_captions(self) -> str:
        """Why there can be none; empty if there can."""
        if self.subject.captioner is None:
            return "a stage-1 run writes none"
        return "" if self.subject.evaluation.num_captions else "evaluation.num_captions is 0"


def _captions(job: _Job) -> list[str]:
    if job.no_captions:
        return [f"captions: {job.no_captions}"]
    return report_captions(job.report, job.request.section, job.subject, job.captions(), job.out)


def _reconstruction(job: _Job) -> list[str]:
    count = job.subject.evaluation.num_redrawn
    if not count:
        return ["reconstruction: evaluation.num_redrawn is 0"]
    drawn = redraw_examples(job.subject, count)
    # Captions stand beside the pictures only if they were asked for.
    return report_reconstruction(
        job.report, job.request.section, job.subject, drawn, job.records, job.out
    )


def _denoising(job: _Job) -> list[str]:
    count = job.subject.evaluation.num_denoising
    if not count:
        return ["denoising comparison: evaluation.num_denoising is 0"]
    job.report.begin_group(group_of(job.subject))
    report_denoising(job.report, job.request.section, job.subject, count, job.out)
    return []


def _vqa(job: _Job) -> list[str]:
    if not job.request.answerer:
        return ["questions: no language model to answer them (--answerer)"]
    if job.no_captions:
        return [f"questions: there are no captions to answer from, {job.no_captions}"]
    return report_questions(job.report, job.subject, job.request, job.captions(), job.out)


_PARTS = {
    "captions": _captions, "reconstruction": _reconstruction, "denoising": _denoising,
    "vqa": _vqa,
}  # fmt: skip
