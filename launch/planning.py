"""The plan of a job on a topology, as one value."""

import dataclasses
from typing import Any

import jax

from launch.chips import Chip
from launch.compiling import Compiled, Lowered, compile_job, lower_job, model_flops
from launch.jobs import PlannedJob
from launch.layouts import layout_problems
from launch.memory import Memory
from launch.roofline import Roofline, Run, roofline, run_of
from launch.topology import Topology, libtpu_version, topology_devices

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job would need and take.

    Attributes:
      job: its name.
      config: as the command named it, and the values that were changed.
      topology, slices, num_chips, chip: where.
      mesh: size of each axis.
      batch_size: over all devices.
      steps: of the run; 0 where that depends on the data.
      fits: whether the compiler found room; None where nothing was compiled.
      lowered: see launch.compiling.
      compiled: see launch.compiling; None where nothing was compiled.
      model_flops: of a step on all devices, nothing computed twice.
      roofline: None where the step does not fit.
      prompt: the same of the program that runs first, where there is one.
      run: None where the step does not fit.
      effort: of the compiler.
      fit: the largest batch a device, where it was asked for (launch.fitting).
      remedies: what was tried where the step does not fit (launch.remedies).
      layout: what is wrong with the layout (launch.layouts).
      versions: of jax and libtpu.
    """

    job: str
    config: str
    topology: str
    slices: int
    num_chips: int
    chip: Chip
    mesh: dict[str, int]
    batch_size: int
    steps: int
    fits: bool | None
    lowered: Lowered
    compiled: Compiled | None
    model_flops: float
    roofline: Roofline | None
    run: Run | None
    effort: str
    prompt: Roofline | None = None
    fit: Any = None
    remedies: tuple[Any, ...] = ()
    layout: tuple[str, ...] = ()
    versions: dict[str, str]

    @property
    def memory(self) -> Memory:
        """Of the compiled step; the arguments alone where nothing was compiled."""
        return self.lowered.memory if self.compiled is None else self.compiled.memory

    def to_json(self) -> dict[str, Any]:
        """Plain values; the lowered program is left out, its fingerprint is there."""
        lowered = dataclasses.replace(self.lowered, program=None, call=None, before=None)  # type: ignore[arg-type]
        values = dataclasses.asdict(dataclasses.replace(self, lowered=lowered))
        for name in ("program", "slices", "call", "before"):
            values["lowered"].pop(name)
        values["memory"] = dataclasses.asdict(self.memory) | {
            "total": self.memory.total, "headroom": self.memory.headroom,
        }  # fmt: skip
        if self.roofline is not None:
            values["roofline"] |= {"seconds": self.roofline.seconds, "bound": self.roofline.bound}
        if self.prompt is not None:
            values["prompt"] |= {"seconds": self.prompt.seconds, "bound": self.prompt.bound}
        if self.compiled is not None and self.compiled.before is not None:
            memory = self.compiled.before.memory
            values["prompt_memory"] = {"total": memory.total, "headroom": memory.headroom}
        return {"format": FORMAT, **values}


def make_plan(
    job: PlannedJob,
    topology: Topology,
    *,
    config: str,
    effort: str = "low",
    price_per_chip_hour: float | None = None,
) -> Plan:
    """Compiles a job for a pod slice.

    Raises:
      PlanError: no such topology, or mesh and batch do not go with it.
    """
    devices, chip = topology_devices(topology), topology.chip
    lowered = lower_job(job, devices, chip)  # checks mesh and batch, too
    useful = model_flops(job, lowered, devices)
    compiled = compile_job(lowered, effort)
    line, run = roofline_of(compiled, chip), None
    prompt = compiled.before and roofline_of(compiled.before, chip)
    rows = lowered.call.rows or job.batch_size
    if line is not None:
        run = run_of(
            line.seconds, steps=job.steps,
            units={name: n // job.batch_size * rows for name, n in job.units.items()},
            num_chips=topology.num_chips, price_per_chip_hour=price_per_chip_hour,
        )  # fmt: skip
    return Plan(
        job=job.name, config=config, topology=topology.name, slices=topology.slices,
        num_chips=topology.num_chips, chip=chip, mesh=lowered.mesh_shape,
        batch_size=rows, steps=job.steps, fits=compiled.problem is None,
        lowered=lowered, compiled=compiled, model_flops=useful, roofline=line, run=run,
        prompt=prompt, layout=layout_problems(lowered, compiled),
        effort=effort, versions={"jax": jax.__version__, "libtpu": libtpu_version()},
    )  # fmt: skip


def roofline_of(compiled: Compiled, chip: Chip) -> Roofline | None:
    """The least time of a compiled program; None if it did not fit."""
    if compiled.cost is None:
        return None
    return roofline(
        chip, flops=compiled.cost.flops, hbm_bytes=compiled.cost.hbm_bytes,
        collectives=compiled.collectives,
    )  # fmt: skip


def make_gpu_plan(
    job: PlannedJob, chip: Chip, *, config: str, price_per_chip_hour: float | None = None
) -> Plan:
    """Of one GPU, without compiling for it: arguments, arithmetic and the roofline of it.

    Raises:
      PlanError: mesh and batch do not go with one device.
    """
    devices = jax.devices("cpu")[:1]
    lowered = lower_job(job, devices, chip)  # checks mesh and batch, too
    useful = model_flops(job, lowered, devices)
    # Traffic is not known without a compiler; the arguments are read once at least.
    line = roofline(chip, flops=lowered.traced_flops, hbm_bytes=lowered.memory.arguments)
    run = run_of(
        line.seconds, steps=job.steps, units=job.units, num_chips=1,
        price_per_chip_hour=price_per_chip_hour,
    )  # fmt: skip
    return Plan(
        job=job.name, config=config, topology=chip.name, slices=1, num_chips=1, chip=chip,
        mesh=lowered.mesh_shape, batch_size=job.batch_size, steps=job.steps, fits=None,
        lowered=lowered, compiled=None, model_flops=useful, roofline=line, run=run,
        effort="", versions={"jax": jax.__version__, "libtpu": ""},
    )  # fmt: skip
