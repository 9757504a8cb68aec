"""`python -m vlv_jax.evaluate --config configs/vlv_stage2.py[:mini] --workdir RUN [--out DIR]`.

RUN is a working directory of `vlv_jax.train` or a directory of `vlv_jax.export`. Writes
report.json, report.html and, for every part that is measured, evaluated_<part>.jsonl with each
example's scores, from which `python -m vlv_jax.compare` compares runs. A part that is measured
again is replaced as a whole; what other evaluations wrote into the same report stays. Several
processes share the batches; process 0 writes, the bytes that one alone writes.

A run of stage 1 gives `<section>.stage1.denoising_loss` and `<section>.reconstruction`; one of
stage 2 `<section>.caption`, `<section>.vqa`, `<section>.reconstruction` (which replaces that of
stage 1 in the same section) and `<section>.stage2.denoising_loss`.
"""

import pathlib

from absl import flags

from core_jax.gathering import first_says, first_writes
from vlv_jax.commands import run_command
from vlv_jax.evaluation.run import (
    PARTS,
    Request,
    evaluate,
    load_subject,
    problem_with_parts,
    provenance_of,
)
from vlv_jax.experiment import Experiment

_OUT = flags.DEFINE_string("out", None, "Where the report goes; the working directory by default.")
_PARTS = flags.DEFINE_list("parts", list(PARTS), f"What to measure, of {', '.join(PARTS)}.")
_SECTION = flags.DEFINE_string("section", "vlv", "Section of the report; dots nest it.")
_TITLE = flags.DEFINE_string("title", "VLV", "Heading of the page.")
_ANSWERER = flags.DEFINE_string(
    "answerer", "", "Hub directory of a language model that answers questions from captions."
)
_INSTRUCTION = flags.DEFINE_string(
    "answerer_instruction", "", "First paragraph of the answerer's prompts; empty for none."
)


def _check_parts(parts: list[str]) -> bool:
    problem = problem_with_parts(parts)
    if problem:
        raise flags.ValidationError(problem)
    return True


flags.register_validator("parts", _check_parts)


def _job(experiment: Experiment, workdir: pathlib.Path) -> None:
    request = Request(
        parts=_PARTS.value, section=_SECTION.value, title=_TITLE.value,
        answerer=_ANSWERER.value, instruction=_INSTRUCTION.value,
    )  # fmt: skip
    out = pathlib.Path(_OUT.value).expanduser() if _OUT.value else workdir
    subject = load_subject(workdir, experiment, request.parts)
    with first_writes(out) as place:
        evaluate(
            subject, place, request, provenance=provenance_of(workdir, subject), say=first_says
        )
    first_says(f"wrote {out / 'report.json'} and {out / 'report.html'}")


if __name__ == "__main__":
    run_command(_job)
