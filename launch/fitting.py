"""The largest batch a device that fits: two compiles, a line through them, one that confirms."""

import dataclasses
import math

from launch.compiling import compile_job, lower_job
from launch.jobs import PlannedJob
from launch.planning import Plan
from launch.topology import Topology, topology_devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """What a device needs as a function of its batch.

    Attributes:
      fixed: bytes at a batch of 0.
      per_example: bytes an example.
      tried: (batch a device, bytes needed, whether it fits), in the order they were compiled.
      largest: the largest batch a device that was compiled and fits; 0 if none was found.
    """

    fixed: float
    per_example: float
    tried: tuple[tuple[int, int, bool], ...]
    largest: int

    def table(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        """For reports."""
        from launch.plan_text import size_text

        rows = [(str(b), size_text(n), "fits" if ok else "does not fit") for b, n, ok in self.tried]
        title = (
            f"Largest batch a device: {self.largest} (line: {size_text(self.fixed)} and "
            f"{size_text(self.per_example)} an example)"
        )
        return (title, ("a device", "needs", ""), rows)


def line_through(a: tuple[int, int], b: tuple[int, int]) -> tuple[float, float]:
    """(value at 0, slope) of the line through two points."""
    slope = (b[1] - a[1]) / (b[0] - a[0])
    return a[1] - slope * a[0], slope


def largest_below(fixed: float, slope: float, limit: float, multiple: int) -> int:
    """The largest multiple whose line stays under a limit; 0 if there is none."""
    if slope <= 0:
        return 0
    return max(0, math.floor((limit - fixed) / slope / multiple) * multiple)


def fit_batch(job: PlannedJob, topology: Topology, plan: Plan, effort: str) -> Fit:
    """Finds the largest batch; `plan` is the first of the two compiles.

    A confirming compile that fails is followed by smaller ones, four at most.
    """
    devices = topology_devices(topology)
    assert plan.compiled is not None
    # Devices along other axes hold the same rows.
    parts = math.prod(plan.mesh.get(name, 1) for name in ("data", "fsdp"))
    multiple = job.experiment.run.grad_accum
    tried: list[tuple[int, int, bool]] = []

    def compile_at(batch: int) -> tuple[int, int]:
        lowered = lower_job(job.with_batch(batch * parts), devices, topology.chip)
        compiled = compile_job(lowered, effort)
        tried.append((batch, compiled.memory.total, compiled.problem is None))
        return tried[-1][:2]

    first = (plan.batch_size // parts, plan.compiled.memory.total)
    tried.append((*first, bool(plan.fits)))
    other = first[0] * 2 if plan.fits else first[0] // 2 // multiple * multiple
    if other < multiple:
        return Fit(fixed=first[1], per_example=0.0, tried=tuple(tried), largest=0)
    fixed, slope = line_through(first, compile_at(other))
    guess = largest_below(fixed, slope, plan.memory.limit, multiple)
    for _ in range(4):
        if guess < multiple or any(guess == batch for batch, _, _ in tried):
            break
        compile_at(guess)
        if tried[-1][2]:
            break
        guess -= multiple
    largest = max((batch for batch, _, ok in tried if ok), default=0)
    return Fit(fixed=fixed, per_example=slope, tried=tuple(tried), largest=largest)
