"""A compiled program's text as instructions: what runs, how often, and on what shapes.

The text is XLA's HLO as `compiled.as_text()` prints it. Only what plans need is understood.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_END = re.compile(r"^\}(?:, execution_thread=.*)?$")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's type, as the program lays it out.

    Attributes:
      dtype: HLO's name.
      dims: its sizes.
      space: memory space; 0 is the device's main memory (HBM), 1 what is on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def num_bytes(self) -> int:
        """Without what the layout pads."""
        width = _BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 0)
        return math.ceil(math.prod(self.dims) * width)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the program.
      opcode: such as "fusion".
      type: the text of the output's type.
      operands: names; the text itself of a constant and of a parameter's number.
      attributes: the text after the operands.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the output; several if it is a tuple."""
        return parse_shapes(self.type)

    @property
    def called(self) -> str | None:
        """The computation of a fusion or a call."""
        found = _CALLED.search(self.attributes)
        return found.group(1) if found else None

    def attribute(self, name: str) -> str:
        """The text of an attribute without blanks in it; empty if it is absent."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """A whole program.

    Attributes:
      computations: instructions by computation, in their order.
      entry: the computation that runs.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Every instruction."""
        return {i.name: i for body in self.computations.values() for i in body}

    def root(self, computation: str) -> Instruction:
        """The result of a computation."""
        return next(i for i in self.computations[computation] if i.is_root)

    def running(self) -> Iterator[tuple[Instruction, int, str]]:
        """(instruction, how often it runs, the fused computation that it is in or "").

        Loops count as often as they turn (`trip_count`); of a conditional every branch counts.
        """
        yield from self._running(self.entry, 1, "")

    def _running(self, name: str, times: int, fused: str) -> Iterator[tuple[Instruction, int, str]]:
        for instruction in self.computations[name]:
            yield instruction, times, fused
            if instruction.opcode == "while":
                turns = trip_count(self, instruction)
                yield from self._running(instruction.attribute("body")[1:], times * turns, fused)
            elif instruction.opcode == "conditional":
                text = re.search(r"(?:branch|true)_computations?=.*", instruction.attributes)
                for branch in _NAME.findall(text.group(0)) if text else ():
                    if branch in self.computations:
                        yield from self._running(branch, times, fused)
            elif instruction.opcode in ("fusion", "call", "async-start", "custom-call"):
                called = instruction.called
                if called in self.computations:
                    inside = called if instruction.opcode != "call" else fused
                    yield from self._running(called, times, inside)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Every array in the text of a type."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d) for d in dims.split(",") if d)
        found.append(Shape(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(found)


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation in the text.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in _whole_lines(text):
        if _END.match(line):
            body = None
        elif not line.startswith(" ") and (head := _COMPUTATION.match(line)):
            body = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif body is not None and (head := _HEAD.match(line)):
            body.append(_instruction(head, line[head.end() :]))
    if not entry:
        raise ValueError("the text has no ENTRY computation; it is not a compiled program's")
    return Program(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """The lines of a text, those of a kernel's metadata joined to the instruction that they end."""
    whole = ""
    for line in text.splitlines():
        goes_on = line and not line.startswith((" ", "%", "ENTRY", "HloModule"))
        if whole.startswith(" ") and goes_on and not _END.match(line):
            whole = f"{whole} {line}"
        else:
            yield whole
            whole = line
    yield whole


def _instruction(head: re.Match, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    inner = rest[start + 1 : stop]
    operands = tuple(_NAME.findall(inner)) or ((inner,) if inner else ())
    return Instruction(
        head.group(2), rest[:start], kind, operands, rest[stop + 1 :], bool(head.group(1))
    )


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found.group() == "(" else -1
        if not depth:
            return start + found.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def trip_count(program: Program, loop: Instruction) -> int:
    """How often a counted loop turns at most; 1 where that cannot be seen.

    XLA's text has the number for some backends. The TPU's leaves it out, so it is read from the
    condition `counter < limit`, the counter's first value, and what the body adds to it. A loop
    that may also end earlier has `counter < limit and ...`.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    condition = loop.attribute("condition")[1:]
    if condition not in program.computations:
        return 1
    root = program.root(condition)
    if root.opcode == "and":
        both = [program.by_name[name] for name in root.operands]
        root = next((i for i in both if i.opcode == "compare"), root)
    if root.opcode == "fusion" and root.called in program.computations:
        inner = [i.name for i in program.computations[root.called or ""]]
        constants = (_constant(program, name) for name in (*root.operands, *inner))
        return next((c for c in constants if c), 1)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return 1
    counter, limit = program.by_name[root.operands[0]], _constant(program, root.operands[1])
    if limit is None or counter.opcode != "get-tuple-element":
        return 1
    place = int(counter.attribute("index"))
    start, step = 0, 1
    begin = program.by_name.get(loop.operands[0])
    if begin is not None and begin.opcode == "tuple":
        start = _constant(program, begin.operands[place]) or 0
    result = program.root(loop.attribute("body")[1:])
    if result.opcode == "tuple":
        after = program.by_name[result.operands[place]]
        if after.opcode == "add":
            values = [_constant(program, name) for name in after.operands]
            step = next((v for v in values if v), 1)
    return max(1, -(-(limit - start) // step))


def _constant(program: Program, name: str) -> int | None:
    found = program.by_name.get(name)
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = program.by_name.get(found.operands[0])
    if found is None or found.opcode != "constant" or not re.fullmatch(r"-?\d+", found.operands[0]):
        return None
    return int(found.operands[0])
