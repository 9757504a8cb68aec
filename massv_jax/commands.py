"""Every command line of this package: its experiment, and what a user of it can mend."""

from collections.abc import Callable

from core_jax import commands
from massv_jax.experiment import Experiment


def run_command(
    job: Callable[..., None],
    *,
    workdir: bool = True,
    config: bool = True,
    define: Callable[[], None] = lambda: None,
    in_step: bool = False,
) -> None:
    """Runs `job(experiment, workdir)`; see `core_jax.commands.run_command`."""
    from core_jax.decode.target import TargetError
    from massv_jax.binding import BindingError
    from massv_jax.drafter_config import DrafterError
    from massv_jax.exporting import ExportError
    from massv_jax.generating_files import JobError
    from massv_jax.speculative.decoder import RequestError
    from massv_jax.workdir import WorkdirError

    commands.run_command(
        job, Experiment, example="configs/massv_phase2.py:mini",
        errors=(
            BindingError, DrafterError, ExportError, JobError, RequestError, TargetError,
            WorkdirError,
        ),
        workdir=workdir, config=config, define=define, in_step=in_step,
    )  # fmt: skip
