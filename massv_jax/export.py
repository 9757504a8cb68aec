"""Turns a working directory into a drafter's directory for others.

    python -m massv_jax.export --workdir RUN --out DIR [--nopad_vocab_to_target]

It works at any time, while training goes on. Drafters of stock form become hub directories that
transformers loads; others become MASSV directories, and the command says so. The target is the one
that the run was made with, or --target.
"""

import json
import pathlib

from absl import flags

from massv_jax.commands import run_command
from massv_jax.experiment import Experiment


def _define() -> None:
    flags.DEFINE_string("out", None, "Directory to write.", required=True)
    flags.DEFINE_string("target", None, "The target's directory; the run's own by default.")
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16", "float16"],
        "Type of the stored weights; each as it is held by default.",
    )  # fmt: skip
    flags.DEFINE_bool("pad_vocab_to_target", True, "Give the table as many rows as the target's.")
    flags.DEFINE_string("report", None, "report.json for the model card.")


def _job(experiment: Experiment | None, workdir: pathlib.Path) -> None:
    del experiment  # the run knows its own
    from core_jax.train.workdir import newest_step
    from massv_jax.exporting import export_drafter
    from massv_jax.workdir import load_experiment, open_drafter

    values = flags.FLAGS
    own = load_experiment(workdir)
    target = values.target or own.model.target
    parts = open_drafter(workdir, target)
    file = pathlib.Path(values.report) if values.report else workdir / "report.json"
    report = json.loads(file.read_text()) if file.is_file() else {}
    facts = {"task": own.task, "step": newest_step(workdir),
             "data": own.data.answers or own.data.source.path or own.data.source.name}  # fmt: skip
    stock = export_drafter(
        parts, values.out, target, pad_vocab_to_target=values.pad_vocab_to_target,
        dtype=values.dtype, facts=facts, report=report,
    )  # fmt: skip
    kind = "stock hub directory" if stock else (
        f"MASSV directory (no hub architecture computes kind {parts.drafter.config.kind!r} with "
        f"pooling {parts.drafter.config.pooling})"
    )  # fmt: skip
    print(f"wrote {values.out}: a {kind}", flush=True)


if __name__ == "__main__":
    run_command(_job, config=False, define=_define)
