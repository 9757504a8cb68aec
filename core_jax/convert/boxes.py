"""Which bytes of a stored tensor some parts of it need: a plan, without any reading.

A tensor is seen as rows [d0, d1, ...]: parts are cut along the first two axes; what lies within an
index of those is read whole. Bytes between two parts that are fewer than a page are read as well,
since a file system reads whole pages: asking for them saves calls and costs nothing.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

# (start, stop) for each axis.
Box = tuple[tuple[int, int], ...]

PAGE_BYTES = 4096
# Large enough for a disk, small enough that a transposed copy stays within a core's cache: of 0.25
# to 32 MiB, 1 to 4 were the fastest, and 32 took three times as long.
BLOCK_BYTES = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows and columns to read at once, and the boxes that have a share in them.

    Attributes:
      rows: [start, stop) of the first axis.
      columns: [start, stop) of the second.
      whole: read everything from the first to the last byte, what is between the rows' parts too;
        otherwise row by row.
      boxes: numbers of the boxes.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    whole: bool
    boxes: tuple[int, ...]


def plan_blocks(
    shape: Sequence[int], itemsize: int, boxes: Sequence[Box], *, block_bytes: int = BLOCK_BYTES
) -> Iterator[Block]:
    """Blocks of at most `block_bytes` (or a single row) that together hold all boxes.

    Args:
      shape: of the tensor, two axes or more.
      itemsize: bytes of an element.
      boxes: with as many axes as the tensor; they may overlap.
      block_bytes: upper limit.

    Yields:
      Blocks in the order of their rows. A box's columns lie within the block's.
    """
    cell = math.prod(shape[2:]) * itemsize
    boxes = list(boxes)
    some = [i for i, box in enumerate(boxes) if all(a < b for a, b in box)]
    cuts = sorted({edge for i in some for edge in boxes[i][0]})
    for top, bottom in itertools.pairwise(cuts):
        here = [i for i in some if boxes[i][0][0] <= top and bottom <= boxes[i][0][1]]
        for left, right, sharers in _merged(here, boxes, cell):
            run, gap = (right - left) * cell, (shape[1] - right + left) * cell
            whole = gap < PAGE_BYTES
            step = max(1, block_bytes // (run + gap if whole else run))
            for row in range(top, bottom, step):
                yield Block((row, min(row + step, bottom)), (left, right), whole, sharers)


def _merged(
    here: Sequence[int], boxes: Sequence[Box], cell: int
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Columns of the boxes, joined where fewer bytes than a page are between them."""
    group: list[int] = []
    left = right = 0
    for i in sorted(here, key=lambda i: boxes[i][1]):
        start, stop = boxes[i][1]
        if group and (start - right) * cell >= PAGE_BYTES:
            yield left, right, tuple(group)
            group = []
        if not group:
            left = right = start
        group.append(i)
        right = max(right, stop)
    if group:
        yield left, right, tuple(group)
