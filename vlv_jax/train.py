"""`python -m vlv_jax.train --config configs/vlv_stage1.py[:mini] --workdir DIR`."""

import functools
import pathlib
import sys

from vlv_jax.commands import run_command
from vlv_jax.experiment import Experiment
from vlv_jax.planning import step_flops
from vlv_jax.training import train


def _job(experiment: Experiment, workdir: pathlib.Path) -> None:
    result = train(
        experiment, workdir, count_flops=functools.partial(step_flops, experiment)
    )  # fmt: skip
    if result.preempted:
        print(f"stopped at step {result.step}; run the same command to continue", flush=True)
        sys.exit(143)  # what a shell reports for SIGTERM


if __name__ == "__main__":
    run_command(_job, in_step=True)
