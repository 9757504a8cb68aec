"""The one table of machines: what each topology is called by every service that sells it.

Names are libtpu's, as `jax.experimental.topologies` takes them: "v5e:16x16". GPUs are
"h200:8", GPUs of one node; "cpu:2x4" is two processes of four devices on this machine.

Sources: Google's pages "TPU versions", "TPU runtime versions" (Cloud TPU), "Plan TPUs in GKE" and
"Create a MIG with a multi-host TPU slice" (Compute Engine), as of 2026.
"""

import dataclasses
import math
import re
from typing import Literal


class SliceError(ValueError):
    """A topology is unknown, or a service does not have it; the message says what there is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A kind of chip.

    Attributes:
      kind: what jax runs on.
      type_prefix: of Cloud TPU's accelerator types; empty: not sold by the Cloud TPU API.
      units_per_chip: what the number in an accelerator type counts: chips, or two cores of each.
      runtime: software version of Cloud TPU VMs.
      gke: node label cloud.google.com/gke-tpu-accelerator.
      machines: chips of a host -> Compute Engine machine type.
      image: family of Compute Engine images; empty: no instance groups.
      shapes: slices that can be had.
      whole_hosts: shapes that are one host with all of their chips, where most hosts have four.
    """

    kind: Literal["tpu", "gpu", "cpu"]
    type_prefix: str = ""
    units_per_chip: int = 1
    runtime: str = ""
    gke: str = ""
    machines: dict[int, str] = dataclasses.field(default_factory=dict)
    image: str = ""
    shapes: tuple[str, ...] = ()
    whole_hosts: tuple[str, ...] = ()


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
)  # fmt: skip
_IMAGE = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"
ACCELERATORS = {
    "v4": Accelerator(
        kind="tpu", type_prefix="v4", units_per_chip=2, runtime="tpu-ubuntu2204-base",
        gke="tpu-v4-podslice", machines={4: "ct4p-hightpu-4t"}, shapes=_CUBES,
    ),
    "v5e": Accelerator(
        kind="tpu", type_prefix="v5litepod", runtime="v2-alpha-tpuv5-lite",
        gke="tpu-v5-lite-podslice", shapes=_FLAT, whole_hosts=("1x1", "2x2", "2x4"),
        machines={1: "ct5lp-hightpu-1t", 4: "ct5lp-hightpu-4t", 8: "ct5lp-hightpu-8t"},
    ),
    "v5p": Accelerator(
        kind="tpu", type_prefix="v5p", units_per_chip=2, runtime="v2-alpha-tpuv5",
        gke="tpu-v5p-slice", machines={4: "ct5p-hightpu-4t"}, image=_IMAGE, shapes=_CUBES,
    ),
    "v6e": Accelerator(
        kind="tpu", type_prefix="v6e", runtime="v2-alpha-tpuv6e", gke="tpu-v6e-slice",
        image=_IMAGE, shapes=_FLAT, whole_hosts=("1x1", "2x2", "2x4"),
        machines={1: "ct6e-standard-1t", 4: "ct6e-standard-4t", 8: "ct6e-standard-8t"},
    ),
    "tpu7x": Accelerator(  # the Cloud TPU API does not have it
        kind="tpu", gke="tpu7x", machines={4: "tpu7x-standard-4t"},
        image="ubuntu-accel-2404-amd64-tpu-tpu7x", shapes=_CUBES,
    ),
    **{
        name: Accelerator(kind="gpu", shapes=("1", "2", "4", "8"))
        for name in ("a100", "h100", "h200", "b200")
    },
    "cpu": Accelerator(kind="cpu"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """One slice: chips with a fast network between them.

    Attributes:
      name: "v5e:16x16".
      accelerator: its row of the table.
      shape: "16x16".
      chips: in the slice.
      hosts: machines (on a CPU: processes) of the slice, one process each; with GPUs one node.
    """

    name: str
    accelerator: Accelerator
    shape: str
    chips: int
    hosts: int

    @property
    def chips_per_host(self) -> int:
        """Chips of one host."""
        return self.chips // self.hosts

    @property
    def machine(self) -> str:
        """Compute Engine's machine type."""
        return self.accelerator.machines[self.chips_per_host]

    @property
    def accelerator_type(self) -> str:
        """Cloud TPU's accelerator type.

        Raises:
          SliceError: the Cloud TPU API does not have it.
        """
        row = self.accelerator
        if not row.type_prefix:
            raise SliceError(f"{self.name} is not sold by the Cloud TPU API; use gke or mig")
        return f"{row.type_prefix}-{self.chips * row.units_per_chip}"


def find_slice(name: str) -> Slice:
    """A row of the table by its name.

    Raises:
      SliceError: there is no such row.
    """
    family, _, shape = name.partition(":")
    row = ACCELERATORS.get(family)
    if row is None:
        raise SliceError(
            f"topology {name!r} is unknown; it starts with one of "
            f"{', '.join(f'{known}:' for known in ACCELERATORS)}"
        )
    if row.kind == "cpu":
        if not re.fullmatch(r"[1-9]\d{0,2}x[1-9]\d{0,2}", shape):
            raise SliceError(f"topology {name!r}: write cpu:PROCESSESxDEVICES, such as cpu:2x4")
    elif shape not in row.shapes:
        raise SliceError(f"topology {name!r} is unknown; {family} has {', '.join(row.shapes)}")
    sizes = [int(size) for size in shape.split("x")]
    chips = math.prod(sizes)
    if row.kind == "cpu":
        hosts = sizes[0]
    elif row.kind == "gpu" or shape in row.whole_hosts:
        hosts = 1
    else:
        hosts = chips // 4
    return Slice(name=name, accelerator=row, shape=shape, chips=chips, hosts=hosts)
