"""Config values that may make a step fit, tried by compiling them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from core_jax.config import ConfigError
from launch.compiling import compile_job, lower_job
from launch.errors import PlanError
from launch.jobs import PlannedJob
from launch.planning import Plan
from launch.topology import Topology, topology_devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change that was tried.

    Attributes:
      changes: config values by path.
      flags: the same as they are typed after the command.
      needs: bytes of a device.
      fits: whether there was room.
    """

    changes: Mapping[str, Any]
    flags: str
    needs: int
    fits: bool


def candidates(job: PlannedJob, plan: Plan) -> Iterator[dict[str, Any]]:
    """Changes that leave what is learned as it is, the cheapest in time first.

    Args:
      job: as it was planned.
      plan: for the mesh.
    """
    if not job.trains:
        yield from _without_training(job, plan)
        return
    model, run, data = job.experiment.model, job.experiment.run, job.experiment.data
    changes: dict[str, Any] = {}
    if model.execution.remat != "full":
        changes |= {"model.execution.remat": "full"}
        yield dict(changes)
    if "fsdp" not in plan.mesh and plan.num_chips > 1:
        # One at a time: a mesh that the user chose may have a reason.
        changes |= {"run.mesh": {"data": 1, "fsdp": -1}}
        yield dict(changes)
    parts = plan.mesh.get("data", 1) * plan.mesh.get("fsdp", 1)
    accumulated = run.grad_accum * 2
    while data.batch_size % (parts * accumulated) == 0:
        yield changes | {"run.grad_accum": accumulated}
        accumulated *= 2


def _without_training(job: PlannedJob, plan: Plan) -> Iterator[dict[str, Any]]:
    """Of caching and decoding: nothing is kept for a backward pass, and results are by row."""
    changes: dict[str, Any] = {}
    if job.splits_networks and plan.mesh.get("tensor", 1) == 1 and plan.num_chips > 1:
        changes |= {"run.mesh": {"data": 1, "tensor": -1}}
        yield dict(changes)
    # The mesh may not go with the networks and is passed over then: smaller batches without it.
    for base in (changes, {}) if changes else ({},):
        batch = job.batch_size // 2
        while batch >= 1:
            yield base | {job.batch_path: batch}
            batch //= 2


def try_remedies(
    job: PlannedJob, topology: Topology, plan: Plan, effort: str, at_most: int
) -> tuple[Remedy, ...]:
    """Compiles changes until one fits; what does not go with the topology is passed over.

    Args:
      job: as it was planned.
      topology: where.
      plan: that does not fit.
      effort: of the compiler.
      at_most: so many compiles.
    """
    devices, tried = topology_devices(topology), []
    for changes in candidates(job, plan):
        if len(tried) == at_most:
            break
        try:
            lowered = lower_job(job.changed(changes), devices, topology.chip)
        except (PlanError, ConfigError):
            continue
        compiled = compile_job(lowered, effort)
        fits = compiled.problem is None
        needs, flags = max(compiled.needs), job.flags_of(changes)
        tried.append(Remedy(changes=changes, flags=flags, needs=needs, fits=fits))
        if fits:
            break
    return tuple(tried)
