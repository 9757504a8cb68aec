"""Measures drafters, or certifies that one changes nothing.

    python -m massv_jax.evaluate --config configs/massv_eval.py:mini --out runs/report \
        [--arm text] [--arm massv=DIR] [--arm other=DIR] [--arm lookup]
    python -m massv_jax.evaluate --config configs/massv_lossless.py:mini --out runs/certificate

The first writes report.json, report.html and evaluated_acceptance.jsonl: accepted lengths,
acceptance by place, distances from the target's distributions, and whether drafters look. The
second writes certificate.json and ends with status 1 if a check fails. Several processes share the
batches; process 0 times alone, and writes the bytes that one process alone writes.
"""

import pathlib

from absl import flags

from massv_jax.commands import run_command
from massv_jax.experiment import Experiment


def _define() -> None:
    flags.DEFINE_string("out", None, "Folder of the report or certificate.", required=True)
    flags.DEFINE_multi_string("arm", [], "name=directory, or text or lookup; repeat it.")
    flags.DEFINE_string("section", "massv", "Section of the report; dots nest it.")
    flags.DEFINE_string("title", "MASSV", "Heading of the page.")


def _job(experiment: Experiment, workdir: pathlib.Path | None) -> None:
    from core_jax.gathering import first_says, first_writes
    from massv_jax.evaluation.prompts import EvaluationError
    from massv_jax.evaluation.run import evaluate, load_subject, parse_arms

    values = flags.FLAGS
    out = pathlib.Path(values.out).expanduser()
    given = [f"massv={workdir}"] if workdir and not values.arm else values.arm
    try:
        if experiment.task not in ("eval", "lossless"):
            raise EvaluationError(
                f"a config of the task {experiment.task!r}; use configs/massv_eval.py or "
                "configs/massv_lossless.py"
            )
        subject = load_subject(experiment, parse_arms(given, experiment))
        if experiment.task == "lossless":
            from massv_jax.evaluation.certificate import certify

            with first_writes(out) as place:
                passed = certify(subject, place, say=first_says)
            if not passed:
                raise SystemExit(f"error: a check failed; see {out / 'certificate.json'}")
            return
        with first_writes(out) as place:
            evaluate(subject, place, section=values.section, title=values.title, say=first_says)
    except EvaluationError as error:
        raise SystemExit(f"error: {error}") from error
    first_says(f"wrote {out / 'report.json'} and {out / 'report.html'}")


if __name__ == "__main__":
    run_command(_job, workdir=False, define=_define)
