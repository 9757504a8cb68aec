"""What the command lines of both methods share: flags, config, quiet logs, one-line errors."""

import dataclasses
import difflib
import pathlib
import re
import typing
from collections.abc import Callable

from absl import app, flags, logging

from core_jax.config import ConfigError, to_dataclass


def run_command(
    job: Callable[..., None],
    experiment: type,
    *,
    example: str,
    errors: tuple[type[BaseException], ...],
    workdir: bool = True,
    config: bool = True,
    define: Callable[[], None] = lambda: None,
) -> None:
    """Parses flags and runs `job(experiment, workdir)`.

    A user's mistake ends with one line and status 1 instead of a traceback. Flags are defined
    here, not on import, so that two commands can be imported by one program.

    Args:
      job: what to do; a flag that is not required and not given comes as None.
      experiment: dataclass that the config file becomes.
      example: a config file, for the help text.
      errors: of the method, that a user can mend; `core_errors` come on top.
      workdir: whether that flag is required.
      config: whether that flag is required.
      define: defines the command's own flags.
    """
    from ml_collections import config_flags

    files = config_flags.DEFINE_config_file(
        "config", None, f"Experiment file, such as {example}.", lock_config=True
    )
    place = flags.DEFINE_string(
        "workdir", None, "Where the run lives; resuming is the same command."
    )
    define()
    required = {"config": config, "workdir": workdir}
    flags.mark_flags_as_required([name for name, needed in required.items() if needed])

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)  # Orbax tells every detail at INFO
        try:
            values = files.value.to_dict() if files.value is not None else None
            told = to_dataclass(experiment, values) if values is not None else None
        except ConfigError as error:
            raise SystemExit(f"error: {error}") from error
        path = pathlib.Path(place.value).expanduser().absolute() if place.value else None
        try:
            job(told, path)
        except (*core_errors(), *errors) as error:
            raise SystemExit(f"error: {error}") from error

    app.run(main, flags_parser=lambda argv: _parse(argv, experiment))


def _parse(argv: list[str], experiment: type) -> list[str]:
    """Flags of a locked config: an unknown one ends with the nearest name, not a traceback."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        # ml_collections: "'stesp'\nDid you mean ...", for groups the bare name.
        name = re.sub(r"\W*(\w+).*", r"\1", str(error.args[0]), flags=re.DOTALL)
        near = difflib.get_close_matches(name, config_names(experiment), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SystemExit(f"error: config value {name!r} is unknown{hint}") from error
    except flags.Error as error:
        raise SystemExit(f"error: {error}") from error


def config_names(cls: type) -> set[str]:
    """Names of a dataclass's fields and of the dataclasses in them."""
    names = set()
    for name, kind in typing.get_type_hints(cls).items():
        names.add(name)
        for inner in (kind, *typing.get_args(kind)):  # the parts of `EvaluationConfig | None`
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                names |= config_names(inner)
    return names


def core_errors() -> tuple[type[BaseException], ...]:
    """What a user can mend; everything else is ours and keeps its traceback."""
    from core_jax.convert.rules import WeightsError
    from core_jax.convert.safetensors_io import CheckpointFormatError
    from core_jax.data.bad import TooManyBadExamples
    from core_jax.data.sources import SourceError
    from core_jax.models.auto import UnknownModelError
    from core_jax.train.errors import NonFiniteError, ResumeError

    return (
        WeightsError, CheckpointFormatError, UnknownModelError, SourceError, TooManyBadExamples,
        NonFiniteError, ResumeError, FileNotFoundError,
    )  # fmt: skip
