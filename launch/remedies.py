"""Config values that may make a step fit, tried by compiling them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from launch.compiling import compile_job, lower_job
from launch.jobs import PlannedJob
from launch.planning import Plan
from launch.topology import Topology, topology_devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change that was tried.

    Attributes:
      changes: config values by path.
      needs: bytes of a device.
      fits: whether there was room.
    """

    changes: Mapping[str, Any]
    needs: int
    fits: bool

    @property
    def flags(self) -> str:
        """As they are typed after the command."""
        return " ".join(f"--config.{path}={value}" for path, value in self.changes.items())


def candidates(job: PlannedJob, plan: Plan) -> Iterator[dict[str, Any]]:
    """Changes that leave what is learned as it is, the cheapest in time first.

    Args:
      job: as it was planned.
      plan: for the mesh.
    """
    if not job.trains:
        return  # nothing is kept for a backward pass, and a batch is the user's to choose
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


def try_remedies(
    job: PlannedJob, topology: Topology, plan: Plan, effort: str, at_most: int
) -> tuple[Remedy, ...]:
    """Compiles changes until one fits.

    Args:
      job: as it was planned.
      topology: where.
      plan: that does not fit.
      effort: of the compiler.
      at_most: so many compiles.
    """
    devices, tried = topology_devices(topology), []
    for _, changes in zip(range(at_most), candidates(job, plan), strict=False):
        compiled = compile_job(lower_job(job.changed(changes), devices, topology.chip), effort)
        fits = compiled.problem is None
        tried.append(Remedy(changes=changes, needs=compiled.memory.total, fits=fits))
        if fits:
            break
    return tuple(tried)
