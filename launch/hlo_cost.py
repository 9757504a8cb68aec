"""Arithmetic and traffic of a compiled program, loops counted as often as they turn.

`compiled.cost_analysis()` counts the body of a loop once, and layers are loops here. Products and
convolutions count two operations a multiply-add, as in `core_jax.flops`, and only where neither
padding nor dilation has put a zero; nothing else counts.
"""

import dataclasses
import functools
import math
import re

from launch.hlo import Instruction, Program, Shape

# They move nothing, or what they do is counted elsewhere.
_FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency",
    "get-dimension-size", "domain",
})  # fmt: skip
# What writes a part of its first operand in place, and which operand it writes there.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# Custom calls that compute nothing.
_MARKERS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "annotate_device_placement")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one device in one step.

    Attributes:
      flops: operations of products and convolutions.
      flops_once: the same with every loop turning once, as the compiler counts.
      hbm_bytes: read from and written to the main memory.
      hbm_bytes_once: the same with every loop turning once.
    """

    flops: float
    flops_once: float
    hbm_bytes: float
    hbm_bytes_once: float


def count_cost(program: Program) -> Cost:
    """Counts a program."""
    flops = once = traffic = traffic_once = 0.0
    for instruction, times, fused in program.running():
        operations = _flops(program, instruction)
        flops, once = flops + times * operations, once + operations
        if not fused:
            moved = _traffic(program, instruction)
            traffic, traffic_once = traffic + times * moved, traffic_once + moved
    return Cost(flops, once, traffic, traffic_once)


def _flops(program: Program, instruction: Instruction) -> float:
    if instruction.opcode == "convolution":
        return _convolution(program, instruction)
    if instruction.opcode != "dot":
        return 0.0
    left = program.by_name[instruction.operands[0]].shapes[0].dims
    over = [int(d) for d in re.findall(r"\d+", instruction.attribute("lhs_contracting_dims"))]
    return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(left[d] for d in over)


def _convolution(program: Program, instruction: Instruction) -> float:
    left, right = (program.by_name[n].shapes[0].dims for n in instruction.operands[:2])
    out = instruction.shapes[0].dims
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels"))
    if labels is None:
        return 0.0
    of_left, of_right, of_out = labels.groups()
    groups = int(instruction.attribute("feature_group_count") or 1)
    batch_groups = int(instruction.attribute("batch_group_count") or 1)
    total = 2.0 * left[of_left.index("f")] / groups * right[of_right.index("o")]
    total *= left[of_left.index("b")] / batch_groups
    spatial = sorted(c for c in of_out if c.isdigit())
    window = _window(instruction.attributes, len(spatial))
    for axis, settings in zip(spatial, window, strict=True):
        total *= _valid_places(
            left[of_left.index(axis)], right[of_right.index(axis)], out[of_out.index(axis)],
            *settings,
        )  # fmt: skip
    return total


def _window(attributes: str, rank: int) -> list[tuple[int, int, int, int]]:
    """(stride, low padding, input dilation, kernel dilation) of each spatial axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", found.group(1))) if found else {}

    def numbers(name: str, default: int) -> list[int]:
        if name not in fields:
            return [default] * rank
        return [int(part.split("_")[0]) for part in fields[name].split("x")]

    return list(zip(
        numbers("stride", 1), numbers("pad", 0), numbers("lhs_dilate", 1),
        numbers("rhs_dilate", 1), strict=True,
    ))  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _valid_places(
    size: int, kernel: int, out: int, stride: int, low: int, dilation: int, kernel_dilation: int
) -> int:
    """Pairs of an output and a kernel element that meet an element of the input."""
    extent = (size - 1) * dilation + 1
    count = 0
    for k in range(kernel):
        first = k * kernel_dilation - low
        places = range(first, first + out * stride, stride)
        count += sum(1 for p in places if 0 <= p < extent and p % dilation == 0)
    return count


def _traffic(program: Program, instruction: Instruction) -> float:
    """Bytes between main memory and chip of an instruction that is not inside a fusion."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or opcode.endswith("-update"):
        return 0.0
    if opcode == "custom-call" and any(m in instruction.attributes for m in _MARKERS):
        return 0.0
    given = [program.by_name[n].shapes for n in instruction.operands if n in program.by_name]
    result = _in_hbm(instruction.shapes)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * result
    if opcode in _UPDATES:
        return 2.0 * _in_hbm(given[_UPDATES[opcode]])
    if opcode == "fusion" and instruction.called in program.computations:
        return _fusion_traffic(program, instruction)
    if opcode.endswith("-start"):
        # The result repeats the operand; what arrives is as large as what leaves, at least.
        return 2.0 * sum(_in_hbm(shapes) for shapes in given)
    return result + sum(_in_hbm(shapes) for shapes in given)


def _in_hbm(shapes: tuple[Shape, ...]) -> int:
    return sum(s.num_bytes for s in shapes if s.space == 0)


def _fusion_traffic(program: Program, fusion: Instruction) -> float:
    """Operands and results, but of what is only sliced or updated in place, that part alone."""
    inner = program.computations[fusion.called or ""]
    users: dict[str, list[Instruction]] = {}
    for instruction in inner:
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    total = 0.0
    for parameter in (i for i in inner if i.opcode == "parameter"):
        operand = program.by_name[fusion.operands[int(parameter.operands[0])]]
        if any(s.space for s in operand.shapes):
            continue
        total += min(
            _read(program, parameter, users), sum(s.num_bytes for s in operand.shapes)
        )
    root = program.root(fusion.called or "")
    roots = [root]
    if root.opcode == "tuple":
        roots = [program.by_name[n] for n in root.operands]
    for shape, result in zip(fusion.shapes, roots, strict=False):
        if shape.space:
            continue
        update = _behind(program, result)
        if update.opcode in _UPDATES:
            new = program.by_name[update.operands[_UPDATES[update.opcode]]]
            total += sum(s.num_bytes for s in new.shapes)
        else:
            total += shape.num_bytes
    return total


def _behind(program: Program, instruction: Instruction) -> Instruction:
    while instruction.opcode in ("bitcast", "copy"):
        instruction = program.by_name[instruction.operands[0]]
    return instruction


def _read(program: Program, value: Instruction, users: dict[str, list[Instruction]]) -> float:
    """Bytes of a fusion's parameter that the fusion looks at."""
    total, whole = 0.0, sum(s.num_bytes for s in value.shapes)
    for user in users.get(value.name, ()):
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += sum(s.num_bytes for s in user.shapes)
        elif user.opcode in _UPDATES and user.operands[0] == value.name:
            total += 0.0  # overwritten in place
        elif user.opcode == "bitcast":
            total += _read(program, user, users)
        elif user.opcode == "fusion" and user.called in program.computations:
            body = program.computations[user.called]
            deeper: dict[str, list[Instruction]] = {}
            for instruction in body:
                for name in instruction.operands:
                    deeper.setdefault(name, []).append(instruction)
            for place, name in enumerate(user.operands):
                if name == value.name:
                    inside = next(i for i in body if i.opcode == "parameter"
                                  and i.operands == (str(place),))  # fmt: skip
                    total += _read(program, inside, deeper)
        else:
            return whole
    return min(total, whole)
