"""The target answers an instruction file; phase 2 learns the answers.

    python -m massv_jax.distill --config configs/massv_distill.py:mini --out runs/answers

The same command goes on where it stopped. With several processes, process i takes every n-th chunk
(`--process_index`, `--process_count`; under jax.distributed its own by default), and whoever ends
last merges them: the answers are byte for byte those of one process.
"""

import pathlib

import jax
from absl import flags

from massv_jax.commands import run_command
from massv_jax.experiment import Experiment


def _define() -> None:
    flags.DEFINE_string("out", None, "Folder of the answers.", required=True)
    flags.DEFINE_integer("process_index", None, "Which of the processes this is.")
    flags.DEFINE_integer("process_count", None, "How many share the work.")


def _job(experiment: Experiment, workdir: pathlib.Path | None) -> None:
    from core_jax.decode.target import TargetError
    from massv_jax.distilling import run
    from massv_jax.distilling_files import DistillError
    from massv_jax.generating import JobError
    from massv_jax.speculative.decoder import RequestError

    del workdir
    values = flags.FLAGS
    index, count = values.process_index, values.process_count
    try:
        run(
            experiment,
            pathlib.Path(values.out).expanduser(),
            process_index=jax.process_index() if index is None else index,
            process_count=jax.process_count() if count is None else count,
        )
    except (DistillError, JobError, RequestError, TargetError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    run_command(_job, workdir=False, define=_define)
