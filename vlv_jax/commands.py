"""What the command lines of this package share: flags, config, quiet logs."""

import pathlib
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from core_jax.config import ConfigError, to_dataclass
from vlv_jax.experiment import Experiment

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file, such as configs/vlv_stage1.py:mini.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; resuming is the same command."
)


def run_command(job: Callable[[Experiment, pathlib.Path], None], *, workdir: bool = True) -> None:
    """Parses flags and runs `job(experiment, workdir)`.

    A user's mistake ends with one line and status 2 instead of a traceback.
    """
    flags.mark_flags_as_required(["config", "workdir"] if workdir else ["config"])

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)  # Orbax tells every detail at INFO
        try:
            experiment = to_dataclass(Experiment, _CONFIG.value.to_dict())
        except ConfigError as error:
            raise SystemExit(f"error: {error}") from error
        path = pathlib.Path(_WORKDIR.value).expanduser().absolute() if _WORKDIR.value else None
        try:
            job(experiment, path)
        except USER_ERRORS as error:
            raise SystemExit(f"error: {error}") from error

    app.run(main)


def _user_errors() -> tuple[type[BaseException], ...]:
    from core_jax.convert.rules import WeightsError
    from core_jax.convert.safetensors_io import CheckpointFormatError
    from core_jax.data.bad import TooManyBadExamples
    from core_jax.data.sources import SourceError
    from core_jax.models.auto import UnknownModelError
    from core_jax.train.errors import NonFiniteError, ResumeError
    from vlv_jax.workdir import WorkdirError

    return (
        WeightsError, CheckpointFormatError, UnknownModelError, SourceError, TooManyBadExamples,
        NonFiniteError, ResumeError, WorkdirError, FileNotFoundError,
    )  # fmt: skip


USER_ERRORS = _user_errors()
