"""Working directories: the config a run was made with, and the drafter that it holds."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from core_jax.config import to_dataclass
from core_jax.decode.target import Target
from core_jax.partition import flatten, unflatten
from core_jax.train.checkpoint import load_params
from core_jax.train.run_record import FILE_NAME as RECORD_FILE
from core_jax.train.run_record import has_checkpoint
from core_jax.train.workdir import (
    EXPERIMENT_FILE,
    WorkdirError,
)
from massv_jax.binding import Binding
from massv_jax.experiment import Experiment
from massv_jax.loading import DrafterParts, is_drafter, load_drafter, make_drafter
from massv_jax.pixels import pixel_limits

TARGET_BINDING = "target"  # in a run record's `extra`


def load_experiment(workdir: pathlib.Path) -> Experiment:
    """The config that a working directory was made with.

    Raises:
      WorkdirError: it is not a working directory.
    """
    file = pathlib.Path(workdir) / EXPERIMENT_FILE
    if not file.is_file():
        raise WorkdirError(
            f"{workdir} has no {EXPERIMENT_FILE}: it is not a working directory of massv_jax.train"
        )
    return to_dataclass(Experiment, json.loads(file.read_text()), path=EXPERIMENT_FILE)


def assemble(
    experiment: Experiment, *, mesh: Any = None, loaded: Target | None = None
) -> DrafterParts:
    """The drafter that a run starts from: fresh, or that of `run.init_from`.

    Args:
      experiment: of the run.
      mesh: where parameters are placed.
      loaded: the target, where it is loaded already; see `load_drafter`.

    Raises:
      WorkdirError: `run.init_from` has no drafter, or another one than the config's.
      BindingError: it was made for another target.
    """
    model, run = experiment.model, experiment.run
    limits = pixel_limits(experiment.data)
    if run.init_from and is_drafter(run.init_from):
        parts = load_drafter(
            run.init_from, model.target, execution=model.execution, mesh=mesh, loaded=loaded,
            limits=limits,
        )  # fmt: skip
        _check_kind(parts, experiment, run.init_from)
        return parts
    parts = make_drafter(
        model.target, model.language_model, kind=None if model.kind == "auto" else model.kind,
        pooling=model.pooling, seed=run.seed, init_from_target=model.init_from_target,
        execution=model.execution, mesh=mesh, loaded=loaded, limits=limits,
    )  # fmt: skip
    if run.init_from:
        check_target(pathlib.Path(run.init_from), parts.binding)
        return overlay(parts, trained_params(pathlib.Path(run.init_from)), where=run.init_from)
    return parts


def open_drafter(
    path: str | pathlib.Path, target: str | pathlib.Path | None = None, **options: Any
) -> DrafterParts:
    """The drafter of a working directory (its newest checkpoint), drafter directory or export.

    Args:
      path: the directory.
      target: the target's directory; the one that a run was made with by default.
      **options: of `load_drafter`; `dtype` is for drafter directories.

    Raises:
      WorkdirError: neither of the three, or a run without a checkpoint.
      BindingError: it was made for another target.
    """
    path = pathlib.Path(path)
    if is_drafter(path):
        if target is None:
            raise WorkdirError(f"{path} is a drafter directory: its target's directory is needed")
        return load_drafter(path, target, **options)
    experiment = load_experiment(path)
    if target is not None:
        model = dataclasses.replace(experiment.model, target=str(target))
        experiment = dataclasses.replace(experiment, model=model)
    if "execution" in options:
        model = dataclasses.replace(experiment.model, execution=options["execution"])
        experiment = dataclasses.replace(experiment, model=model)
    parts = assemble(experiment, mesh=options.get("mesh"), loaded=options.get("loaded"))
    check_target(path, parts.binding)
    return overlay(parts, own_params(path, experiment), where=str(path))


def check_target(workdir: pathlib.Path, found: Binding) -> None:
    """Compares the target at hand with the one that a run was trained for (run.json).

    Raises:
      WorkdirError: nothing was trained yet.
      BindingError: it is another one; everything that differs is named.
    """
    file = workdir / RECORD_FILE
    if not has_checkpoint(str(workdir)) or not file.is_file():
        raise WorkdirError(f"{workdir} has no checkpoint yet; train it first, or name another run")
    record = json.loads(file.read_text())
    # A run of an earlier release has the hash of the weights alone.
    weights = {"weights": record.get("frozen_hashes", {}).get("target")}
    made_for = record.get("extra", {}).get(TARGET_BINDING, weights)
    dataclasses.replace(found, **made_for).check(found, where=str(workdir))


def own_params(workdir: pathlib.Path, experiment: Experiment) -> dict[str, Any]:
    """The trained parameters in a run's newest checkpoint, averaged ones where it kept them.

    Raises:
      WorkdirError: there is no checkpoint.
    """
    if not has_checkpoint(str(workdir)):
        raise WorkdirError(f"{workdir} has no checkpoint yet; train it first, or name another run")
    return load_params(str(workdir), ema=experiment.run.ema_decay is not None)


def trained_params(path: pathlib.Path) -> dict[str, Any]:
    """Everything that a run, and the runs before it, trained."""
    experiment = load_experiment(path)
    found: dict[str, Any] = {}
    before = experiment.run.init_from
    if before and not is_drafter(before):
        found = flatten(trained_params(pathlib.Path(before)))
    found |= flatten(own_params(path, experiment))
    return unflatten(found)


def overlay(parts: DrafterParts, source: Mapping[str, Any], *, where: str) -> DrafterParts:
    """The drafter with the leaves of `source` put in, in their type and where the old ones lay.

    Raises:
      WorkdirError: `source` has leaves that the drafter lacks, or of another shape; all are named.
    """
    flat, new = flatten(parts.params), flatten(source)
    problems = [f"{n}: no such parameter" for n in new if n not in flat]
    problems += [
        f"{n}: shape {new[n].shape}, not {flat[n].shape}"
        for n in new
        if n in flat and new[n].shape != flat[n].shape
    ]
    if problems:
        raise WorkdirError(f"{where} does not fit the config:\n  " + "\n  ".join(problems))
    placed = {n: jax.device_put(x, flat[n].sharding) for n, x in new.items()}
    params = unflatten({**flat, **placed})
    params.setdefault("projector", {})
    return dataclasses.replace(parts, params=params)


def _check_kind(parts: DrafterParts, experiment: Experiment, where: str) -> None:
    config, model = parts.drafter.config, experiment.model
    asked = (config.kind if model.kind == "auto" else model.kind, model.pooling)
    if asked != (config.kind, config.pooling):
        raise WorkdirError(
            f"{where} holds a drafter of kind {config.kind!r} with pooling {config.pooling}, the "
            f"config asks for {asked[0]!r} with {asked[1]}"
        )
