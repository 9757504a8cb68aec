"""Compiles a job's step for devices that are not there, and says what the compiler said."""

import dataclasses
import time
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from core_jax.abstract import AbstractProgram
from core_jax.flops import count_jaxpr
from core_jax.sharding import make_mesh
from launch import hlo
from launch.chips import Chip
from launch.collectives import Collective, find_collectives
from launch.errors import PlanError
from launch.fingerprint import fingerprint, joined
from launch.hlo_cost import Cost, count_cost
from launch.jobs import PlannedJob
from launch.memory import (
    Memory,
    OutOfMemory,
    argument_memory,
    compiled_memory,
    parse_out_of_memory,
    replicated_bytes,
)

# Low effort takes a ninth of the time for the same FLOPs and 2 % other temporaries (the gradient
# of Stable Diffusion's UNet, batch 8 a device, v5e:4x4).
EFFORTS: dict[str, dict[str, Any]] = {
    "low": {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0},
    "full": {},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowered:
    """A step that is traced and lowered, on no device.

    Attributes:
      mesh_shape: size of each axis.
      slices: slice of each device, in the mesh's order.
      fingerprint: of the program.
      traced_flops: of the whole step on all devices, recomputation included.
      memory: the arguments.
      replicated_optimizer: bytes of the optimizer's state of which every device has a whole copy.
      program: jax's lowered program.
      seconds: it took.
      call: what was lowered.
      before: the program that runs first and whose result this one takes (a decoder's prompt).
    """

    mesh_shape: dict[str, int]
    slices: list[int]
    fingerprint: str
    traced_flops: float
    memory: Memory
    replicated_optimizer: int
    program: Any
    seconds: float
    call: AbstractProgram
    before: "Lowered | None" = None


def lower_job(job: PlannedJob, devices: list[Any], chip: Chip, platform: str = "") -> Lowered:
    """Traces and lowers a job's step for devices, which may be a topology's.

    Args:
      job: the job.
      devices: of which the config's mesh is made.
      chip: what they stand for.
      platform: lowers for "tpu" on any devices, CPUs say. The program is that of a
        topology's devices of the same mesh, but for the version in which kernels are written, and
        it cannot be compiled.

    Raises:
      PlanError: mesh or batch do not go with the devices.
    """
    try:
        mesh = make_mesh(job.mesh, devices)
    except ValueError as error:
        raise PlanError(f"config.run.mesh: {error}") from error
    try:
        program = job.program(mesh)
    except ValueError as error:  # such as heads that the axis doesn't divide
        raise PlanError(f"config.run.mesh {dict(mesh.shape)}: {error}") from error
    check_batch(job, program.batch_sharding)
    return lower_program(program, mesh, chip, platform)


def lower_program(
    program: AbstractProgram, mesh: Mesh, chip: Chip, platform: str = ""
) -> Lowered:
    """Traces and lowers a program, and what runs before it; see `lower_job`."""
    before = program.before and lower_program(program.before, mesh, chip, platform)
    began = time.perf_counter()
    traced = program.trace()
    lowered = traced.lower(lowering_platforms=(platform,)) if platform else traced.lower()
    name = fingerprint(lowered)
    return Lowered(
        mesh_shape=dict(mesh.shape),
        slices=[getattr(d, "slice_index", 0) for d in mesh.devices.flat],
        fingerprint=joined(before.fingerprint, name) if before else name,
        traced_flops=count_jaxpr(traced.jaxpr.jaxpr),
        memory=argument_memory(program.parts, chip.limit),
        replicated_optimizer=replicated_bytes(program.parts.get("optimizer")),
        program=lowered,
        seconds=time.perf_counter() - began,
        call=program,
        before=before,
    )


def check_batch(job: PlannedJob, sharding: NamedSharding | None) -> None:
    """Raises unless every device gets the same number of rows of every micro-batch.

    Raises:
      PlanError: it does not.
    """
    if sharding is None:
        return
    batch, accumulated = job.batch_size, job.experiment.run.grad_accum
    axes = sharding.spec[0] if len(sharding.spec) else ()
    names = (axes,) if isinstance(axes, str) else tuple(axes or ())
    parts = accumulated
    for name in names:
        parts *= sharding.mesh.shape[name]
    if batch % parts:
        raise PlanError(
            f"{job.batch_name}={batch} does not divide into {parts} parts (devices that "
            f"split a batch times run.grad_accum={accumulated}); the nearest that does is "
            f"{max(parts, round(batch / parts) * parts)}"
        )


def model_flops(job: PlannedJob, lowered: Lowered, devices: list[Any]) -> float:
    """Operations of a step on all devices, with nothing computed twice.

    Args:
      job: the job.
      lowered: it; where it computes nothing twice anyway, it has been counted.
      devices: as for `lower_job`.
    """
    plain = job.without_remat()
    if plain == job:
        return lowered.traced_flops
    return plain.program(make_mesh(plain.mesh, devices)).flops()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of a step, for one device.

    Attributes:
      memory: how the main memory is split. If it did not fit, what the compiler wants beyond the
        arguments is all in the temporaries.
      problem: what did not fit; None if it did.
      cost: arithmetic and traffic; None if it did not fit.
      compiler_flops, compiler_bytes: the compiler's own count, every loop turning once.
      collectives: the heaviest first.
      seconds: it took.
      before: the same of the program that runs first.
    """

    memory: Memory
    problem: OutOfMemory | None
    cost: Cost | None
    compiler_flops: float | None
    compiler_bytes: float | None
    collectives: list[Collective]
    seconds: float
    before: "Compiled | None" = None

    @property
    def needs(self) -> tuple[int, ...]:
        """Bytes of a device for each program, in the order in which they run."""
        return (*(self.before.needs if self.before else ()), self.memory.total)


def compile_job(lowered: Lowered, effort: str) -> Compiled:
    """Compiles for the devices; not to fit is a result, not an error.

    Args:
      lowered: the step.
      effort: one of EFFORTS.
    """
    if lowered.before is None:
        return _compile(lowered, effort)[0]
    before, program = _compile(lowered.before, effort)
    if program is None:  # where its result lies is not known then; nor would anything follow
        return before
    # As in a run: the second program gets the first one's result where the first one left it.
    call = lowered.call.laid_out(program.output_shardings)
    memory = argument_memory(call.parts, lowered.memory.limit)
    placed = dataclasses.replace(lowered, program=call.trace().lower(), memory=memory)
    return dataclasses.replace(_compile(placed, effort)[0], before=before)


def _compile(lowered: Lowered, effort: str) -> tuple[Compiled, Any]:
    """Also returns jax's compiled program; None if it did not fit."""
    began = time.perf_counter()
    try:
        compiled = lowered.program.compile(compiler_options=EFFORTS[effort])
    except jax.errors.JaxRuntimeError as error:
        problem = parse_out_of_memory(str(error))
        if problem is None:
            raise
        wanted = max(0, problem.used - lowered.memory.arguments)
        memory = dataclasses.replace(lowered.memory, temporaries=wanted, limit=problem.limit)
        return Compiled(
            memory=memory, problem=problem, cost=None, compiler_flops=None, compiler_bytes=None,
            collectives=[], seconds=time.perf_counter() - began,
        ), None  # fmt: skip
    seconds = time.perf_counter() - began
    program = hlo.parse(compiled.as_text())
    analysis = compiled.cost_analysis() or {}
    found = Compiled(
        memory=compiled_memory(lowered.memory, compiled.memory_analysis()),
        problem=None,
        cost=count_cost(program),
        compiler_flops=analysis.get("flops"),
        compiler_bytes=analysis.get("bytes accessed"),
        collectives=find_collectives(program, lowered.mesh_shape, lowered.slices),
        seconds=seconds,
    )
    return found, compiled
