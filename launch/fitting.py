"""The largest batch a device that fits: two compiles, a line through them, one that confirms.

Of decoding there are two programs, the prompts' and the rounds': each has its line, and both must
fit. The prompts' is the one that grows with what the config allows a prompt to be.
"""

import dataclasses
import math
from collections.abc import Callable

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


Compile = Callable[[int], tuple[tuple[int, ...], bool]]


def fit_batch(job: PlannedJob, topology: Topology, plan: Plan, effort: str) -> Fit:
    """Finds the largest batch; `plan` is the first of the two compiles."""
    devices = topology_devices(topology)
    assert plan.compiled is not None
    # Devices along other axes hold the same rows.
    split = ("data", "fsdp") if job.splits_rows else ()
    parts = math.prod(plan.mesh.get(name, 1) for name in split)
    rows = plan.batch_size // job.batch_size  # of one that the config asks for

    def compile_at(batch: int) -> tuple[tuple[int, ...], bool]:
        lowered = lower_job(job.with_batch(batch * parts // rows), devices, topology.chip)
        compiled = compile_job(lowered, effort)
        return compiled.needs, compiled.problem is None

    return search(
        plan.batch_size // parts, (plan.compiled.needs, bool(plan.fits)), compile_at,
        limit=plan.memory.limit, multiple=job.experiment.run.grad_accum,
    )  # fmt: skip


def search(
    batch: int, first: tuple[tuple[int, ...], bool], compile_at: Compile, *,
    limit: float, multiple: int,
) -> Fit:  # fmt: skip
    """A second point, the lines through both, and one compile that confirms.

    A confirming compile that fails is followed by smaller ones, four at most.

    Args:
      batch: a device, of the first point.
      first: the first point: bytes of each program, and whether all fit.
      compile_at: the same of another batch; programs after one that does not fit are left out.
      limit: bytes that there are.
      multiple: of which batches must be.
    """
    needs, fits = first
    tried = [(batch, max(needs), fits)]

    def attempt(at: int) -> tuple[int, ...]:
        found, ok = compile_at(at)
        tried.append((at, max(found), ok))
        return found

    other = batch * 2 if fits else batch // 2 // multiple * multiple
    if other < multiple:
        return Fit(fixed=max(needs), per_example=0.0, tried=tuple(tried), largest=0)
    pairs = zip(needs, attempt(other), strict=False)
    lines = [line_through((batch, a), (other, b)) for a, b in pairs]
    lines = [line for line in lines if line[1] > 0] or lines  # what doesn't grow limits nothing
    guess, (fixed, slope) = min(
        (largest_below(*line, limit, multiple), line) for line in lines
    )  # fmt: skip
    for _ in range(4):
        if guess < multiple or any(guess == known for known, _, _ in tried):
            break
        attempt(guess)
        if tried[-1][2]:
            break
        guess -= multiple
    largest = max((known for known, _, ok in tried if ok), default=0)
    return Fit(fixed=fixed, per_example=slope, tried=tuple(tried), largest=largest)
