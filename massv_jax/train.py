"""`python -m massv_jax.train --config configs/massv_phase1.py[:variant] --workdir DIR`."""

import functools
import pathlib
import sys

from massv_jax.commands import run_command
from massv_jax.experiment import Experiment
from massv_jax.planning import step_flops
from massv_jax.training import train


def _job(experiment: Experiment, workdir: pathlib.Path) -> None:
    result = train(
        experiment, workdir, count_flops=functools.partial(step_flops, experiment)
    )  # fmt: skip
    if result.preempted:
        print(f"stopped at step {result.step}; run the same command to continue", flush=True)
        sys.exit(143)  # what a shell reports for SIGTERM


if __name__ == "__main__":
    run_command(_job, in_step=True)
