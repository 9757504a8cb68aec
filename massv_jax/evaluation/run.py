"""A whole evaluation: arms, temperatures and windows on held-out questions, into a report."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from core_jax.decode.frontends import TextFrontend
from core_jax.evaluation.provenance import command_facts, from_here
from core_jax.evaluation.report import Report
from core_jax.files import write_whole
from core_jax.train.run_record import versions
from massv_jax.distilling import load_limited_target
from massv_jax.evaluation.acceptance import Measured, Tasks, measure, split_tasks
from massv_jax.evaluation.arms import RECORDS
from massv_jax.evaluation.examples import show_answers
from massv_jax.evaluation.forced import Forced, compare_on_answers
from massv_jax.evaluation.looking import can_look, look
from massv_jax.evaluation.prompts import EvaluationError, Question, open_questions
from massv_jax.evaluation.reporting import (
    BASELINE,
    Place,
    records,
    report_acceptance,
    report_forced,
    report_look,
)
from massv_jax.evaluation.speed import PLAIN as PLAIN_ARM
from massv_jax.evaluation.speed import profile_entries, report_speed, time_answers
from massv_jax.experiment import Experiment
from massv_jax.generating import open_drafter_named
from massv_jax.placing import local_mesh
from massv_jax.speculative.decoder import SpeculativeDecoder

PLAIN = "none"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
      experiment: see `Experiment`.
      plain: the target without a drafter.
      arms: name -> the target with a drafter.
    """

    experiment: Experiment
    plain: SpeculativeDecoder
    arms: Mapping[str, SpeculativeDecoder]

    @property
    def images_only(self) -> bool:
        """Whether the target takes no question."""
        frontend = self.plain.target.frontend
        return not frontend.image_ids and not isinstance(frontend, TextFrontend)


def parse_arms(given: Sequence[str], experiment: Experiment) -> dict[str, str]:
    """Arm -> drafter, of "name=directory", "text" and "lookup".

    By default text-only drafting (the baseline) and the config's drafter.

    Raises:
      EvaluationError: a name is given twice, has a dot, or stands for nothing.
    """
    if not given:
        drafter = experiment.model.drafter
        given = [*([BASELINE] if experiment.model.language_model else [])]
        given += [f"massv={drafter}"] if drafter else []
    found: dict[str, str] = {}
    for arm in given:
        name, _, drafter = arm.partition("=")
        drafter = drafter or name
        if not name or "." in name or name in found or name in (PLAIN, PLAIN_ARM):
            raise EvaluationError(
                f"--arm {arm!r}: write name=directory, each name once, no dots, not {PLAIN_ARM!r}"
            )
        if drafter == name and name not in ("text", "lookup"):
            raise EvaluationError(f"--arm {arm!r}: write name=directory, or text or lookup")
        found[name] = drafter
    return found


def load_subject(experiment: Experiment, arms: Mapping[str, str]) -> Subject:
    """Loads the target once, and every arm's drafter."""
    model, decoding = experiment.model, experiment.decoding
    mesh = local_mesh(experiment)
    target = load_limited_target(experiment, mesh=mesh)
    plain = SpeculativeDecoder(
        target, None, accept=decoding.accept, min_confidence=decoding.min_confidence,
        batch_size=decoding.batch_size, prompt_lengths=decoding.prompt_lengths,
    )  # fmt: skip
    options = {"dtype": model.frozen_dtype, "execution": model.execution, "mesh": mesh}
    drafted = {
        name: dataclasses.replace(
            plain, drafter=open_drafter_named(
                drafter, target_dir=model.target, language_model=model.language_model,
                loaded=target, **options,
            ),
        )
        for name, drafter in arms.items()
    }  # fmt: skip
    return Subject(experiment, plain, drafted)


@dataclasses.dataclass
class _Job:
    """What the parts of an evaluation share."""

    subject: Subject
    questions: Sequence[Question]
    place: Place
    say: Callable[[str], None]
    tasks: Tasks = dataclasses.field(default_factory=dict)
    plain: dict[float, Measured] = dataclasses.field(default_factory=dict)
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def plain_at(self, temperature: float) -> Measured:
        """The target's own answers, made once."""
        if temperature not in self.plain:
            self.plain[temperature] = self.measure(self.subject.plain, temperature, 0)
        return self.plain[temperature]

    def measure(self, decoder: SpeculativeDecoder, temperature: float, gamma: int) -> Measured:
        """All questions."""
        decoding = self.subject.experiment.decoding
        return measure(decoder, self.questions, decoding, temperature=temperature, gamma=gamma)


def evaluate(
    subject: Subject,
    out: pathlib.Path,
    *,
    section: str = "massv",
    title: str = "MASSV",
    say: Callable[[str], None] = print,
) -> Report:
    """Measures, and writes report.json, report.html and a line for every answer.

    Args:
      subject: from `load_subject`.
      out: the folder.
      section: of the report.
      title: of the page.
      say: gets a line now and then.

    Raises:
      EvaluationError: there are no questions.
    """
    experiment = subject.experiment
    settings = experiment.evaluation
    questions, left_out = open_questions(
        experiment, images_only=subject.images_only, decoder=subject.plain
    )
    if left_out:
        say(f"{len(left_out)} questions cannot be asked: {dict(list(left_out.items())[:5])}")
    facts = command_facts() | {
        "versions": versions(), "config": dataclasses.asdict(experiment),
    }  # fmt: skip
    report = Report(title, from_here(facts))
    report.begin_group("acceptance")
    options = {"seed": settings.seed, "num_resamples": settings.bootstrap_samples}
    place = Place(report, section, options, {
        "accept": experiment.decoding.accept, "dtype": experiment.model.frozen_dtype,
        "max_new_tokens": experiment.decoding.max_new_tokens,
    })  # fmt: skip
    job = _Job(subject, questions, place, say)
    job.tasks = split_tasks(questions, job.plain_at(0.0), settings.min_answer_tokens, say)
    if not job.tasks:
        raise EvaluationError("no question is left; lower evaluation.min_answer_tokens")
    out.mkdir(parents=True, exist_ok=True)
    parts = {"acceptance": _acceptance, "forced": _forced, "look": _look, "speed": _speed}
    for part, measured in parts.items():
        report.begin_group(part)
        measured(job)
        report.write(out)
    text = "".join(json.dumps(line) + "\n" for line in job.lines)
    write_whole(out / RECORDS, text)
    return report


def _acceptance(job: _Job) -> None:
    settings = job.subject.experiment.evaluation
    ids = [q.id for q in job.questions]
    for temperature in settings.temperatures:
        found = {}
        for arm, decoder in job.subject.arms.items():
            for gamma in settings.gammas:
                measured = job.measure(decoder, temperature, gamma)
                found[arm, gamma] = measured
                total = measured.statistics.total
                job.say(
                    f"{arm}, temperature {temperature:g}, gamma {gamma}: "
                    f"{total.emitted_length[0]:.2f} tokens a pass"
                )
                job.lines += records(
                    ids, job.tasks, measured, arm=arm, temperature=temperature, gamma=gamma
                )
        # Rejection sampling draws other tokens than plain sampling; greedy and coupled do not.
        same = temperature == 0 or job.subject.plain.accept == "coupled"
        plain = job.plain_at(temperature) if same else None
        for task, which in job.tasks.items():
            arms = {key: measured.rows(which) for key, measured in found.items()}
            identical = {}
            if plain is not None:
                base = plain.rows(which)
                identical = {key: measured.same_as(base) for key, measured in arms.items()}
            report_acceptance(job.place, task, temperature, arms, identical)
            if temperature == 0:
                greedy = job.subject.plain, job.plain_at(0.0)
                show_answers(job.place, task, which, job.questions, greedy, found)


def _forced(job: _Job) -> None:
    experiment = job.subject.experiment
    for temperature in experiment.evaluation.temperatures:
        found = {}
        for arm, decoder in job.subject.arms.items():
            compared = compare_on_answers(
                decoder, job.questions, job.plain_at(temperature), experiment.decoding,
                temperature=temperature, batch_size=experiment.decoding.batch_size,
            )  # fmt: skip
            if compared is not None:
                found[arm] = compared
                _join(job, compared, arm, temperature)
        for task, which in job.tasks.items():
            arms = {arm: compared.rows(which) for arm, compared in found.items()}
            report_forced(job.place, task, temperature, arms)


def _join(job: _Job, compared: Forced, arm: str, temperature: float) -> None:
    """Puts distances into the lines of that arm, whatever its window."""
    row_of = {question.id: i for i, question in enumerate(job.questions)}
    for line in job.lines:
        if line["arm"] == arm and line["temperature"] == temperature:
            line.update(compared.of_question(row_of[line["id"]]))


def _speed(job: _Job) -> None:
    experiment = job.subject.experiment
    settings = experiment.evaluation
    if not settings.num_timed or jax.process_index():  # the others wait: nothing disturbs the clock
        return
    entries = {(PLAIN_ARM, 0): job.subject.plain} | {
        (arm, gamma): decoder
        for arm, decoder in job.subject.arms.items() for gamma in settings.gammas
    }  # fmt: skip
    for temperature in settings.temperatures:
        first = job.questions[next(iter(job.tasks.values()))[0]]
        costs = profile_entries(entries, first, experiment.decoding, temperature)
        for task, which in job.tasks.items():
            timed = [job.questions[i] for i in which[: settings.num_timed]]
            job.say(f"timing {len(timed)} {task} at temperature {temperature:g}")
            found = time_answers(entries, timed, experiment.decoding, temperature=temperature)
            report_speed(job.place, task, temperature, found, costs)


def _look(job: _Job) -> None:
    experiment = job.subject.experiment
    decoding = experiment.decoding
    kept = [job.questions[i] for which in job.tasks.values() for i in which]
    lookers = {a: d for a, d in job.subject.arms.items() if can_look(d)}
    if not lookers or sum(bool(q.images) for q in kept) < 2:
        job.say("left out: no drafter that looks, or no two images to show it")
        return
    for temperature in experiment.evaluation.temperatures:
        found = {
            arm: look(
                decoder, kept, decoding, temperature=temperature, gamma=decoding.gamma,
                batch_size=decoding.batch_size,
            )
            for arm, decoder in lookers.items()
        }  # fmt: skip
        report_look(job.place, temperature, decoding.gamma, found)
