"""What devices tell each other in a step: kind, mesh axes, bytes; from the compiled program."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from launch.hlo import Instruction, Program

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
Groups = list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Collectives of one kind over the same mesh axes.

    Attributes:
      kind: one of KINDS.
      axes: mesh axes along which the devices of a group differ.
      group_size: devices that take part together.
      crosses_slices: whether some group spans slices, whose network is slow.
      count: how often in a step, loops counted as often as they turn.
      bytes: of the whole arrays (gathered, or to be reduced) on one device, in a step.
      wire_bytes: that one device must receive, by the best algorithm on a ring.
      largest: bytes of the largest single one.
      largest_name: what it is for (XLA's op_name).
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    crosses_slices: bool
    count: int
    bytes: float
    wire_bytes: float
    largest: float
    largest_name: str


def find_collectives(
    program: Program, mesh_shape: Mapping[str, int], slices: Sequence[int] | None = None
) -> list[Collective]:
    """The collectives of a program, the heaviest first.

    Args:
      program: compiled for the mesh's devices in their order.
      mesh_shape: size of each axis.
      slices: slice of each device in the mesh's order; None: a single one.
    """
    found: dict[tuple, Collective] = {}
    for instruction, times, fused in program.running():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        groups = device_groups(instruction, int(np.prod(list(mesh_shape.values()))))
        size = max(map(len, groups))
        given = sum(
            s.num_bytes for n in instruction.operands for s in program.by_name[n].shapes
        )
        if kind == "all-reduce" and "all-reduce-scatter" in fused:
            kind = "reduce-scatter"  # the TPU's fusion of an all-reduce with a slice of it
        whole = given * size if kind == "all-gather" else given
        one = Collective(
            kind=kind,
            axes=axes_of(groups, mesh_shape),
            group_size=size,
            crosses_slices=slices is not None
            and any(len({slices[d] for d in group}) > 1 for group in groups),
            count=times,
            bytes=float(times * whole),
            wire_bytes=times * wire_bytes(kind, whole, size),
            largest=float(whole),
            largest_name=_op_name(instruction),
        )
        key = (one.kind, one.axes, one.group_size, one.crosses_slices)
        found[key] = _sum(found[key], one) if key in found else one
    return sorted(found.values(), key=lambda c: -c.wire_bytes)


def _sum(a: Collective, b: Collective) -> Collective:
    top = max(a, b, key=lambda c: c.largest)
    return dataclasses.replace(
        a, count=a.count + b.count, bytes=a.bytes + b.bytes,
        wire_bytes=a.wire_bytes + b.wire_bytes, largest=top.largest,
        largest_name=top.largest_name,
    )  # fmt: skip


def wire_bytes(kind: str, whole: float, size: int) -> float:
    """Bytes that one device of a group must receive for a whole array of `whole` bytes.

    A ring receives every part but its own once to gather or to scatter sums, and twice to reduce.
    """
    if kind == "collective-permute":
        return whole
    return (2.0 if kind == "all-reduce" else 1.0) * whole * (size - 1) / size


def _op_name(instruction: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return found.group(1) if found else instruction.name


def axes_of(groups: Groups, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of some group differ."""
    sizes = tuple(mesh_shape.values())
    varying: set[int] = set()
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), sizes))
        varying |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    return tuple(name for i, name in enumerate(mesh_shape) if i in varying)


# mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}; without device_ids, devices are in order.
_MESH = r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\((.*?)\))?\s*\{([^}]*)\}"


def device_groups(instruction: Instruction, num_devices: int) -> Groups:
    """Which devices take part together, by their places in the mesh.

    Raises:
      ValueError: the groups are written in a way that is not known.
    """
    text = instruction.attributes
    if "source_target_pairs=" in text:
        pairs = re.search(r"source_target_pairs=\{((?:\{[\d,]+\},?)*)\}", text)
        if pairs is None:
            raise ValueError(f"unknown source_target_pairs of {instruction.name}: {text[:200]}")
        return [tuple(map(int, p.split(","))) for p in re.findall(r"\{([\d,]+)\}", pairs.group(1))]
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        listed = re.findall(r"\{([\d,]+)\}", found.group(1))
        return [tuple(map(int, g.split(","))) for g in listed] or [tuple(range(num_devices))]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _rows(_iota(found.group(2), found.group(3)), _ints(found.group(1)))
    if found := re.search(_MESH, text):
        return _mesh_groups(*found.groups())
    raise ValueError(f"unknown replica_groups of {instruction.name}: {text[:200]}")


def _ints(text: str) -> list[int]:
    return [int(t) for t in text.split(",")]


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    sizes = _ints(dims)
    devices = np.arange(np.prod(sizes)).reshape(sizes)
    return devices.transpose(_ints(permutation)) if permutation else devices


def _rows(devices: np.ndarray, shape: Sequence[int]) -> Groups:
    return [tuple(row) for row in devices.reshape(-1, shape[-1]).tolist()]


def _mesh_order(ids: str | None, count: int) -> np.ndarray:
    """The devices of the compiler's mesh, one after the other.

    Raises:
      ValueError: the order is written in a way that is not known.
    """
    if ids is None:
        return np.arange(count)
    if re.fullmatch(r"[\d,]+", ids):
        return np.array(_ints(ids))
    found = re.fullmatch(r"(?:\[[\d,]+\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", ids)
    if found is None:
        raise ValueError(f"unknown device_ids {ids[:200]}")
    return _iota(*found.groups()).reshape(-1)


def _mesh_groups(dims: str, ids: str | None, axes: str) -> Groups:
    """Groups over axes of the compiler's own mesh: `mesh['a'=2,'b'=4] {'b'}`.

    A part of an axis is written `'b':(1)2`: of its 4, those 2 before which there is a factor 1.
    """
    sizes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", dims)]
    devices = _mesh_order(ids, int(np.prod([size for _, size in sizes])))
    asked = {
        name: (int(before or 1), int(part or 0))
        for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    shape, grouped = [], []
    for name, size in sizes:
        before, part = asked.get(name, (1, 0))
        part = (part or size) if name in asked else 1
        pieces = (before, part, size // before // part) if name in asked else (size,)
        grouped += [len(shape) + 1] if name in asked else []
        shape += pieces
    rest = [i for i in range(len(shape)) if i not in grouped]
    arranged = devices.reshape(shape).transpose([*rest, *grouped])
    return _rows(arranged, (int(np.prod([shape[i] for i in grouped])),))


def gathered_at_once(collectives: Sequence[Collective]) -> float:
    """Bytes of the largest single gather: what a step holds whole for a moment."""
    return max(itertools.chain(
        (c.largest for c in collectives if c.kind == "all-gather"), (0.0,)
    ))  # fmt: skip
