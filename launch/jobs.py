"""Which jobs can be planned: from a config file's values to a step as shapes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from core_jax.config import to_dataclass
from launch.errors import PlanError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """A job of a config.

    Attributes:
      name: for people.
      experiment: the typed config.
      abstract: (experiment, mesh) -> the step and its arguments as shapes.
      units: what a step handles, by name.
    """

    name: str
    experiment: Any
    abstract: Callable[[Any, Mesh], Any]
    units: dict[str, int]

    @property
    def steps(self) -> int:
        """Of the run."""
        return self.experiment.run.steps

    def with_batch(self, batch_size: int) -> "PlannedJob":
        """The same job with another batch over all devices."""
        old = self.experiment.data.batch_size
        units = {name: count // old * batch_size for name, count in self.units.items()}
        changed = self.changed({"data.batch_size": batch_size})
        return dataclasses.replace(changed, units=units)

    def without_remat(self) -> "PlannedJob":
        """The same job with nothing computed twice: what its arithmetic is."""
        return self.changed({"model.execution.remat": "none"})

    def changed(self, values: Mapping[str, Any]) -> "PlannedJob":
        """The same job with other config values, by their paths (`run.grad_accum`)."""
        experiment = self.experiment
        for path, value in values.items():
            experiment = _replace(experiment, path.split("."), value)
        return dataclasses.replace(self, experiment=experiment)


def _replace(config: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    inner = _replace(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: inner})


def job_of(config: Mapping[str, Any]) -> PlannedJob:
    """The job that a config file describes.

    Raises:
      PlanError: plans of such a config are not made.
      ConfigError: a value is wrong.
    """
    if "stage" in config:
        return _vlv(config)
    if config.get("task") in ("phase1", "phase2"):
        return _massv(config)
    what = f"task {config['task']!r}" if "task" in config else "neither a stage nor a task"
    raise PlanError(
        f"the config has {what}; plans are made of VLV's stages and of MASSV's phases "
        "(configs/vlv_stage1.py, vlv_stage2.py, massv_phase1.py, massv_phase2.py)"
    )


def _vlv(config: Mapping[str, Any]) -> PlannedJob:
    from vlv_jax.experiment import Experiment
    from vlv_jax.planning import abstract_job

    experiment = to_dataclass(Experiment, config)
    units = {"images": experiment.data.batch_size}
    if experiment.stage == 2:
        units["tokens"] = experiment.data.batch_size * experiment.data.max_tokens
    return PlannedJob(
        name=f"VLV stage {experiment.stage}", experiment=experiment, abstract=abstract_job,
        units=units,
    )  # fmt: skip


def _massv(config: Mapping[str, Any]) -> PlannedJob:
    from massv_jax.experiment import Experiment
    from massv_jax.planning import abstract_job

    experiment = to_dataclass(Experiment, config)
    data = experiment.data
    return PlannedJob(
        name=f"MASSV {experiment.task.replace('phase', 'phase ')}",
        experiment=experiment, abstract=abstract_job,
        units={"examples": data.batch_size, "tokens": data.batch_size * data.max_length},
    )  # fmt: skip
