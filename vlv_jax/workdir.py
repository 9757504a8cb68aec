"""What a working directory or an exported directory stands for, as networks and parameters."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from safetensors.flax import load_file

from core_jax.config import to_dataclass
from core_jax.partition import flatten, unflatten
from core_jax.train.checkpoint import load_params
from core_jax.train.run_record import has_checkpoint
from core_jax.train.workdir import (
    EXPERIMENT_FILE,
    WorkdirError,
)
from vlv_jax import networks as names
from vlv_jax.experiment import Experiment, ModelConfig
from vlv_jax.loading import Pieces, load_networks
from vlv_jax.networks import Networks

EXPORT_FILE = "vlv_config.json"
EXPORT_WEIGHTS = "vlv.safetensors"


def load_experiment(workdir: pathlib.Path) -> Experiment:
    """The config that a working directory was made with.

    Raises:
      WorkdirError: it is not a working directory.
    """
    file = pathlib.Path(workdir) / EXPERIMENT_FILE
    if not file.is_file():
        raise WorkdirError(
            f"{workdir} has no {EXPERIMENT_FILE}: it is not a working directory of vlv_jax.train"
        )
    return to_dataclass(Experiment, json.loads(file.read_text()), path=EXPERIMENT_FILE)


def experiment_to_use(workdir: pathlib.Path, given: Experiment) -> Experiment:
    """The config for using a run: what it is comes from the run, how it is used from `given`.

    So a run with other queries or another crop than the config file's needs no repeated flags.
    `given` decides sampling, evaluation, execution and precision, and where the hub's networks
    are if they are no longer where the run found them.

    Raises:
      WorkdirError: it is not a working directory.
    """
    own = load_experiment(workdir)
    moved = {
        name: getattr(given.model, name)
        for name in ("florence2", "diffusion", "language_model")
        if getattr(own.model, name)
        and getattr(given.model, name)
        and not pathlib.Path(getattr(own.model, name)).is_dir()
    }
    model = dataclasses.replace(
        own.model, frozen_dtype=given.model.frozen_dtype, compute_dtype=given.model.compute_dtype,
        vae_dtype=given.model.vae_dtype, execution=given.model.execution, **moved,
    )  # fmt: skip
    return dataclasses.replace(
        own, model=model, sampling=given.sampling, evaluation=given.evaluation
    )


def is_export(path: pathlib.Path) -> bool:
    """Whether a directory was written by `vlv_jax.export`."""
    return (pathlib.Path(path) / EXPORT_FILE).is_file()


def exported_model(path: pathlib.Path, config: ModelConfig | None = None) -> ModelConfig:
    """The model config of an exported directory; precision and execution are `config`'s."""
    content = json.loads((path / EXPORT_FILE).read_text())
    found = ModelConfig(
        florence2=str(path / "florence2"),
        diffusion=str(path / "stable-diffusion"),
        language_model=str(path / "language_model") if content["has_language_model"] else "",
        num_queries=content["num_queries"],
        task_prompt=content["task_prompt"],
        frozen_dtype=content["frozen_dtype"],
        compute_dtype=content["frozen_dtype"],
        vae_dtype=content["vae_dtype"],
    )
    if config is None:
        return found
    return dataclasses.replace(
        found, frozen_dtype=config.frozen_dtype, compute_dtype=config.compute_dtype,
        vae_dtype=config.vae_dtype, execution=config.execution,
    )  # fmt: skip


def overlay(params: Mapping[str, Any], source: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """`params` with the leaves of `source` put in, in the place and type of the old ones.

    Raises:
      WorkdirError: `source` has leaves that `params` lacks, or of another shape; all are named.
    """
    flat, new = flatten(params), flatten(source)
    problems = [f"{n}: no such parameter" for n in new if n not in flat]
    problems += [
        f"{n}: shape {new[n].shape}, not {flat[n].shape}"
        for n in new
        if n in flat and new[n].shape != flat[n].shape
    ]
    if problems:
        raise WorkdirError(f"{where} does not fit the config:\n  " + "\n  ".join(problems))
    for name, leaf in new.items():
        old = flat[name]
        flat[name] = jax.device_put(leaf.astype(old.dtype), old.sharding)
    return unflatten(flat)


def assemble(
    experiment: Experiment,
    *,
    workdir: pathlib.Path | None = None,
    with_decoder: bool = True,
    with_language_model: bool | None = None,
    prefer_ema: bool = True,
    mesh: Any = None,
) -> tuple[Networks, dict[str, Any], Pieces]:
    """Networks with the parameters that an experiment stands for.

    In this order, later ones replacing earlier ones: the hub's weights, `run.init_from`, the
    newest checkpoint of `workdir`. Frozen parameters are in no checkpoint, which is why a stage-2
    run still needs the stage-1 run that it was started from, until it is exported.

    Args:
      experiment: the config.
      workdir: the run whose checkpoint is wanted; None: what training starts from.
      with_decoder: also UNet and VAE.
      with_language_model: also psi and the LLM; by default where the config names one.
      prefer_ema: the moving average instead of the last weights, where there is one.
      mesh: where the hub's weights are placed.

    Raises:
      WorkdirError: a directory has no checkpoint, or one that does not fit.
    """
    networks, params, pieces = load_networks(
        experiment.model,
        with_decoder=with_decoder,
        with_language_model=with_language_model,
        seed=experiment.run.seed,
        mesh=mesh,
    )
    if experiment.run.init_from:
        source = trained_params(pathlib.Path(experiment.run.init_from))
        params = _overlay_known(params, source, where=experiment.run.init_from)
    if workdir is not None:
        source = own_params(workdir, ema=prefer_ema and experiment.run.ema_decay is not None)
        params = _overlay_known(params, source, where=str(workdir))
    return networks, params, pieces


def _overlay_known(params, source, *, where: str):
    """Networks that this job has not loaded are skipped: a captioner needs no UNet."""
    return overlay(params, {n: t for n, t in source.items() if n in params}, where=where)


def own_params(workdir: pathlib.Path, *, ema: bool) -> dict[str, Any]:
    """The trained parameters in a run's newest checkpoint.

    Raises:
      WorkdirError: there is no checkpoint.
    """
    if not has_checkpoint(str(workdir)):
        raise WorkdirError(f"{workdir} has no checkpoint yet; train it first, or name another run")
    return load_params(str(workdir), ema=ema)


def trained_params(path: pathlib.Path) -> dict[str, Any]:
    """Everything that is not the hub's, of a run (with the runs before it) or of an export.

    Raises:
      WorkdirError: neither of the two.
    """
    if is_export(path):
        return exported_params(path)
    experiment = load_experiment(path)
    found: dict[str, Any] = {}
    if experiment.run.init_from:
        found = flatten(trained_params(pathlib.Path(experiment.run.init_from)))
    found |= flatten(own_params(path, ema=experiment.run.ema_decay is not None))
    return unflatten(found)


def view_differences(experiment: Experiment) -> list[str]:
    """What a run shows the networks otherwise than the one in `run.init_from` did; lines of text.

    Raises:
      WorkdirError: `run.init_from` is neither a run nor an export.
    """
    before, now = _shown_by(pathlib.Path(experiment.run.init_from)), _shown(experiment)
    return [
        f"{name}: there {before[name]!r}, here {now[name]!r}"
        for name in now
        if before[name] != now[name]
    ]


def _shown(experiment: Experiment) -> dict[str, Any]:
    data = experiment.data
    return {
        "model.task_prompt": experiment.model.task_prompt,
        "data.image_size": data.image_size,
        # A random crop is another draw of the same view.
        "data.crop": "center" if data.crop == "random" else data.crop,
        "data.resample": data.resample,
        "data.native_crops": data.native_crops,
    }


def _shown_by(path: pathlib.Path) -> dict[str, Any]:
    if not is_export(path):
        return _shown(load_experiment(path))
    content = json.loads((path / EXPORT_FILE).read_text())
    views = {f"data.{name}": value for name, value in content["views"].items()}
    views["data.image_size"] = views.pop("data.size")
    return {"model.task_prompt": content["task_prompt"], **views}


def added_params(path: pathlib.Path) -> dict[str, Any]:
    """What VLV adds to the pretrained networks, of an exported directory."""
    stored = load_file(path / EXPORT_WEIGHTS)
    return unflatten({name.replace(".", "/"): leaf for name, leaf in stored.items()})


def exported_params(path: pathlib.Path) -> dict[str, Any]:
    """Every parameter of an exported directory that training may have changed."""
    from core_jax.models import load_model

    params = added_params(path)
    params[names.FLORENCE2] = load_model(path / "florence2")[1]
    if (path / "language_model").is_dir():
        params[names.LANGUAGE_MODEL] = load_model(path / "language_model")[1]
    return params


def weights_hash(directory: str | pathlib.Path) -> str:
    """sha256 over the names and bytes of a directory's safetensors files."""
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(directory).rglob("*.safetensors")):
        digest.update(file.relative_to(directory).as_posix().encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
