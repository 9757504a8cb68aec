"""What the command lines of both methods share: flags, config, quiet logs, one-line errors."""

import dataclasses
import difflib
import os
import pathlib
import re
import typing
from collections.abc import Callable

from absl import app, flags, logging

from core_jax import distributed
from core_jax.config import ConfigError, to_dataclass
from core_jax.files import storage_problem

_OUTPUTS = ("out", "output")  # flags of commands that say where they write


def run_command(
    job: Callable[..., None],
    experiment: type,
    *,
    example: str,
    errors: tuple[type[BaseException], ...],
    workdir: bool = True,
    config: bool = True,
    define: Callable[[], None] = lambda: None,
    in_step: bool = False,
) -> None:
    """Parses flags and runs `job(experiment, workdir)`.

    A user's mistake ends with one line and status 1 instead of a traceback. Flags are defined
    here, not on import, so that two commands can be imported by one program.

    Where a launch started several processes (`core_jax.distributed`), they meet before anything
    else, and none goes on unless all run the same thing (`core_jax.preflight`).

    Args:
      job: what to do; a flag that is not required and not given comes as None.
      experiment: dataclass that the config file becomes.
      example: a config file, for the help text.
      errors: of the method, that a user can mend; `core_errors` come on top.
      workdir: whether that flag is required.
      config: whether that flag is required.
      define: defines the command's own flags.
      in_step: it trains, and saves on SIGTERM; see `core_jax.distributed.joined`.
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

    _define_processes()

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)  # Orbax tells every detail at INFO
        try:
            path = _workdir(place.value)
            with distributed.joined(_membership(), in_step=in_step):
                told = _agreed_config(files.value, experiment, path)
                try:
                    job(told, path)
                except Exception as error:
                    if text := _users(error, (*core_errors(), *errors)):
                        raise SystemExit(f"error: {text}") from error
                    raise
        except (ConfigError, distributed.DistributedError, distributed.AllStop) as error:
            raise SystemExit(f"error: {error}") from error

    app.run(main, flags_parser=lambda argv: _parse(argv, experiment))


def _define_processes() -> None:
    """Flags of `core_jax.distributed`; on one machine none is needed."""
    flags.DEFINE_string(
        distributed.COORDINATOR, None, "host:port of process 0, in a run of several processes."
    )
    flags.DEFINE_integer(distributed.COUNT, None, "How many processes; 1: this one is alone.")
    flags.DEFINE_integer(distributed.INDEX, None, "Which of them this is, from 0.")
    flags.DEFINE_integer("join_seconds", 300, "How long a process waits for the others.")
    flags.DEFINE_integer(
        "share_seconds", 60, "How long a file in --workdir may take from process to process.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "heartbeat_seconds", 100, "After which a silent process counts as dead, and all end."
    )


def _membership() -> distributed.Membership | None:
    values = flags.FLAGS
    return distributed.find_membership(
        {name: values[name].value for name in distributed.VARIABLES},
        os.environ,
        join_seconds=values.join_seconds,
        heartbeat_seconds=values.heartbeat_seconds,
    )


def _workdir(value: str | None) -> pathlib.Path | None:
    if not value:
        return None
    if "://" in value:
        raise ConfigError(
            f"--workdir={value} is an address, and a folder is needed: mount the bucket, and give "
            "the path below the mount (docs/launching.md)"
        )
    return pathlib.Path(value).expanduser().absolute()


def _agreed_config(values: typing.Any, experiment: type, path: pathlib.Path | None) -> typing.Any:
    """The typed config, once all processes have said that theirs is the same.

    Raises:
      PreflightError: the config is wrong, processes differ, or do not share the working
        directory.
    """
    from core_jax import preflight
    from core_jax.shared_folder import check_shared

    told, problem = None, ""
    try:
        told = to_dataclass(experiment, values.to_dict()) if values is not None else None
    except ConfigError as error:
        problem = str(error)
    extra = _output_paths() | ({"--workdir": str(path)} if path else {})
    preflight.check(told, problem=problem, extra=extra)
    if path:
        check_shared(path, seconds=flags.FLAGS.share_seconds)
    return told


def _output_paths() -> dict[str, str]:
    """Where the command writes, of flags that it may have."""
    values = {name: flags.FLAGS[name].value for name in _OUTPUTS if name in flags.FLAGS}
    return {
        f"--{name}": os.path.abspath(os.path.expanduser(path))
        for name, path in values.items()
        if path
    }


def _parse(argv: list[str], experiment: type) -> list[str]:
    """Flags of a locked config: an unknown one ends with the nearest name, not a traceback."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        raise SystemExit(f"error: {unknown_value(argv, experiment, error)}") from error
    except flags.Error as error:
        raise SystemExit(f"error: {error}") from error


def unknown_value(argv: list[str], experiment: type, error: Exception) -> str:
    """What to say of a config value on the command line that could not be set.

    Args:
      argv: the command line.
      experiment: dataclass that the config becomes.
      error: of ml_collections, whose message has the last part of the name.
    """
    given = [m[1] for word in argv if (m := re.match(r"--config\.([\w.]+)", word))]
    known = config_names(experiment)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"config value {name!r} is unknown{hint}"
    # ml_collections: "'name'\nDid you mean ...", for groups the bare name.
    last = re.sub(r"\W*(\w+).*", r"\1", str(error.args[0]), flags=re.DOTALL)
    name = next((n for n in given if n.split(".")[-1] == last), last)
    return (
        f"config value {name!r} can be set, but this config file leaves it at its default, and a "
        "command line changes only what the file has: add it there"
    )


def config_names(cls: type) -> set[str]:
    """Dotted names of a dataclass's fields and of those of the dataclasses in them."""
    names = set()
    for name, kind in typing.get_type_hints(cls).items():
        names.add(name)
        for inner in (kind, *typing.get_args(kind)):  # the parts of `EvaluationConfig | None`
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                names |= {f"{name}.{rest}" for rest in config_names(inner)}
    return names


def _users(error: Exception, errors: tuple[type[BaseException], ...]) -> str:
    """What a user can mend of an error; "" where it is ours and needs its traceback."""
    if isinstance(error, errors):
        return str(error)
    if told := storage_problem(error):
        return f"{told}. What is whole stays; the same command then goes on from it"
    return ""


def core_errors() -> tuple[type[BaseException], ...]:
    """What a user can mend; everything else is ours and keeps its traceback."""
    from core_jax.convert.rules import WeightsError
    from core_jax.convert.safetensors_io import CheckpointFormatError
    from core_jax.data.bad import TooManyBadExamples
    from core_jax.data.processors import ProcessorError
    from core_jax.data.sources import SourceError
    from core_jax.models.auto import UnknownModelError
    from core_jax.models.hf_config import ModelConfigError
    from core_jax.train.errors import NonFiniteError, ResumeError

    return (
        ConfigError, WeightsError, CheckpointFormatError, UnknownModelError, ModelConfigError,
        SourceError, TooManyBadExamples, NonFiniteError, ResumeError, ProcessorError,
        FileNotFoundError,
    )  # fmt: skip
