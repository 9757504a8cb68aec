"""TPU pods that nobody has to own: devices to compile for, from libtpu alone."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from launch.chips import CHIPS, Chip
from launch.errors import PlanError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A pod slice, or several.

    Attributes:
      chip: what it is made of.
      dims: chips along each axis of a slice.
      slices: how many.
    """

    chip: Chip
    dims: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As libtpu writes it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.dims))}"

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return math.prod(self.dims) * self.slices


def parse_topology(text: str, slices: int = 1) -> Topology:
    """`v5e:16x16` as a topology.

    Raises:
      PlanError: it is no such text, or the chip is unknown.
    """
    chips = sorted(name for name, chip in CHIPS.items() if chip.is_tpu)
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", text)
    if not found or found.group(1) not in chips:
        raise PlanError(
            f"topology {text!r}: write chip:AxB or chip:AxBxC, such as v5e:16x16 or v5p:4x4x8; "
            f"chips are {', '.join(chips)}"
        )
    if slices < 1:
        raise PlanError(f"slices is {slices}; it must be at least 1")
    chip, dims = CHIPS[found.group(1)], tuple(map(int, found.group(2).split("x")))
    if (len(dims) == 3) != (chip.name in ("v4", "v5p")):
        wanted = "three numbers (4x4x8)" if chip.name in ("v4", "v5p") else "two numbers (16x16)"
        raise PlanError(f"topology {text!r}: a {chip.name} slice has {wanted}")
    return Topology(chip=chip, dims=dims, slices=slices)


def prepare_environment() -> None:
    """Lets libtpu compile on a machine without a TPU; before jax is first used.

    Whoever has set them already, keeps them.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def has_libtpu() -> bool:
    """Whether the TPU's compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def libtpu_version() -> str:
    """Its version; empty without it."""
    from importlib import metadata

    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return ""


def topology_devices(topology: Topology) -> list[Any]:
    """Abstract devices of a topology.

    Raises:
      PlanError: libtpu is not installed or does not know the topology.
    """
    if not has_libtpu():
        raise PlanError(
            "the TPU's compiler is not installed; install it with: pip install 'vlv-massv-jax[tpu]'"
        )
    from jax.experimental import topologies

    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except Exception as error:  # libtpu raises what it likes
        first = str(error).splitlines()[0]
        raise PlanError(f"libtpu does not build the topology {topology.name}: {first}") from error
    if len(found.devices) != topology.num_chips:
        raise PlanError(
            f"libtpu {libtpu_version()} gives {len(found.devices)} devices for the "
            f"{topology.num_chips} chips of {topology.name}: cores, of which no mesh can be made. "
            "Plans of v4 are not possible with it; take v5e, v5p or v6e"
        )
    return list(found.devices)
