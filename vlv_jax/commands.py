"""Every command line of this package: its experiment, and what a user of it can mend."""

from collections.abc import Callable

from core_jax import commands
from vlv_jax.experiment import Experiment
from vlv_jax.workdir import WorkdirError


def run_command(
    job: Callable[..., None], *, workdir: bool = True, config: bool = True, in_step: bool = False
) -> None:
    """Runs `job(experiment, workdir)`; see `core_jax.commands.run_command`."""
    commands.run_command(
        job, Experiment, example="configs/vlv_stage1.py:mini", errors=(WorkdirError,),
        workdir=workdir, config=config, in_step=in_step,
    )  # fmt: skip
