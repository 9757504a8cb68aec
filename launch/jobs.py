"""Which jobs can be planned: from a config file's values to a program as shapes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from core_jax.abstract import AbstractProgram
from core_jax.config import to_dataclass
from core_jax.train.placement import AbstractJob
from launch.errors import PlanError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """A job of a config.

    Attributes:
      name: for people.
      experiment: the typed config.
      abstract: (experiment, mesh) -> the step and its arguments as shapes: an `AbstractJob` or
        an `AbstractProgram`.
      units: what a step handles, by name.
      batch_path: config value of the rows of a step.
      batch_flag: by which the command takes them; empty: the config value's.
      splits_rows: whether devices along "data" and "fsdp" hold different rows.
      splits_networks: whether the job can split its networks over "tensor".
      trains: whether it is a training step; others have no number of steps.
    """

    name: str
    experiment: Any
    abstract: Callable[[Any, Mesh], Any]
    units: dict[str, int]
    batch_path: str = "data.batch_size"
    batch_flag: str = ""
    splits_rows: bool = True
    splits_networks: bool = False
    trains: bool = True

    @property
    def steps(self) -> int:
        """Of the run; 0 where that depends on the data."""
        return self.experiment.run.steps if self.trains else 0

    @property
    def mesh(self) -> dict[str, int]:
        """Size of each axis, as configured."""
        return self.experiment.run.mesh

    @property
    def batch_size(self) -> int:
        """As configured."""
        found = self.experiment
        for name in self.batch_path.split("."):
            found = getattr(found, name)
        return found

    @property
    def batch_name(self) -> str:
        """The value's name, for messages."""
        return self.batch_flag or f"config.{self.batch_path}"

    def flags_of(self, changes: Mapping[str, Any]) -> str:
        """Config values by path, as they are typed after the job's command."""
        own = {self.batch_path: self.batch_flag} if self.batch_flag else {}
        return " ".join(f"{own.get(k) or f'--config.{k}'}={v}" for k, v in changes.items())

    def program(self, mesh: Mesh) -> AbstractProgram:
        """The step on a mesh."""
        found = self.abstract(self.experiment, mesh)
        return found.program if isinstance(found, AbstractJob) else found

    def with_batch(self, batch_size: int) -> "PlannedJob":
        """The same job with another batch over all devices."""
        old = self.batch_size
        units = {name: count // old * batch_size for name, count in self.units.items()}
        changed = self.changed({self.batch_path: batch_size})
        return dataclasses.replace(changed, units=units)

    def without_remat(self) -> "PlannedJob":
        """The same job with nothing computed twice: what its arithmetic is."""
        return self.changed({"model.execution": self.experiment.model.execution.plain()})

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


def job_of(config: Mapping[str, Any], job: str = "") -> PlannedJob:
    """The job that a config file describes.

    Args:
      config: its values.
      job: "cache" for the feature cache of VLV's towers, which has no config file of its own.

    Raises:
      PlanError: plans of such a config are not made.
      ConfigError: a value is wrong.
    """
    if job not in ("", "cache") or (job and "stage" not in config):
        raise PlanError(
            f"job {job!r} of this config is not planned; only configs of VLV's stages have a "
            "second one, 'cache'"
        )
    if "stage" in config:
        return _vlv_cache(config) if job else _vlv(config)
    task = config.get("task")
    if task in ("phase1", "phase2"):
        return _massv(config)
    if task in ("distill", "eval"):
        return _decoding(config)
    what = f"task {task!r}" if "task" in config else "neither a stage nor a task"
    raise PlanError(
        f"the config has {what}; plans are made of VLV's stages and feature cache, and of MASSV's "
        "phases, distillation and decoding (configs/vlv_stage1.py, vlv_stage2.py, "
        "massv_phase1.py, massv_phase2.py, massv_distill.py, massv_eval.py)"
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


def _vlv_cache(config: Mapping[str, Any]) -> PlannedJob:
    from vlv_jax.cache import BATCH_SIZE
    from vlv_jax.experiment import Experiment
    from vlv_jax.planning import abstract_cache

    found = PlannedJob(
        name="VLV feature cache", experiment=to_dataclass(Experiment, config),
        abstract=abstract_cache, units={"images": BATCH_SIZE}, trains=False,
        batch_flag="--batch_size",
    )  # fmt: skip
    # The command has its own batch and always splits that alone; what is trained does not matter.
    return found.changed({
        "data.batch_size": BATCH_SIZE, "run.grad_accum": 1, "run.mesh": {"data": -1},
    })  # fmt: skip


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


def _decoding(config: Mapping[str, Any]) -> PlannedJob:
    from massv_jax.experiment import Experiment
    from massv_jax.planning_decoding import abstract_decoding

    experiment = to_dataclass(Experiment, config)
    if experiment.task == "distill":
        rows = experiment.distill.batch_size
        return PlannedJob(
            name="MASSV distillation, a round", experiment=experiment, abstract=abstract_decoding,
            units={"tokens": rows}, batch_path="distill.batch_size", trains=False,
            splits_networks=True,
        )  # fmt: skip
    rows, gamma = experiment.decoding.batch_size, experiment.decoding.gamma
    return PlannedJob(
        name="MASSV speculative decoding, a round", experiment=experiment,
        abstract=abstract_decoding,
        units={"rounds": rows, "tokens, were all drafts kept,": rows * (gamma + 1)},
        batch_path="decoding.batch_size", trains=False, splits_rows=False, splits_networks=True,
    )  # fmt: skip
