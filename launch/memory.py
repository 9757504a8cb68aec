"""What lies in a device's main memory during a step, and why a step does not fit."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device.

    Attributes:
      frozen, trained, optimizer, ema, cache, batch: arguments, by the shapes of their shards. What
        the compiler places counts whole before it has done so.
      padding: what the device's layouts add to the arguments.
      temporaries: activations and whatever else the program holds for itself.
      outputs: results that do not take the place of arguments.
      code: the program.
      limit: what there is.
    """

    frozen: int
    trained: int
    optimizer: int
    ema: int
    batch: int
    cache: int = 0
    padding: int = 0
    temporaries: int = 0
    outputs: int = 0
    code: int = 0
    limit: int

    @property
    def arguments(self) -> int:
        """All of them, as laid out."""
        parts = (self.frozen, self.trained, self.optimizer, self.ema, self.cache, self.batch)
        return sum(parts) + self.padding

    @property
    def total(self) -> int:
        """What the step needs."""
        return self.arguments + self.temporaries + self.outputs + self.code

    @property
    def headroom(self) -> int:
        """What is left; negative if the step does not fit."""
        return self.limit - self.total


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's shards of shapes; those without a sharding count whole."""

    def one(x: Any) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return int(np.prod(shape, dtype=np.int64)) * x.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def replicated_bytes(tree: Any) -> int:
    """Bytes of those leaves of which every device holds a whole copy, on a mesh of several."""
    return sum(
        int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.sharding.num_devices > 1 and x.sharding.is_fully_replicated
    )


def argument_memory(parts: Mapping[str, Any], limit: float) -> Memory:
    """What is known without compiling.

    Args:
      parts: shapes of the arguments, by names of `Memory`'s first fields.
      limit: what there is.
    """
    known = dict.fromkeys(("frozen", "trained", "optimizer", "ema", "cache", "batch"), 0)
    known |= {name: shard_bytes(tree) for name, tree in parts.items()}
    return Memory(**known, limit=int(limit))


def compiled_memory(known: Memory, stats: Any) -> Memory:
    """With what the compiler says (`compiled.memory_analysis()`).

    Args:
      known: the arguments.
      stats: arguments, outputs, those that share memory, temporaries and code, in bytes.
    """
    return dataclasses.replace(
        known,
        padding=stats.argument_size_in_bytes - known.arguments,
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """What the compiler says of a step that does not fit.

    Attributes:
      used, limit: bytes.
      largest: (bytes, shape, what it is for) of the largest temporaries.
    """

    used: int
    limit: int
    largest: tuple[tuple[int, str, str], ...]


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)B?"
# libtpu 0.0.42.1 says the first (seen; the number has the arguments in it, whatever it says), and
# other versions the second, with a list of the largest allocations (literature, not seen here).
_COMPLAINTS = (
    rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
    rf"[Uu]sed {_SIZE} of {_SIZE} hbm",
)


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """The compiler's complaint; None if it is about something else."""
    matches = (re.search(pattern, message) for pattern in _COMPLAINTS)
    found = next((m for m in matches if m), None)
    if found is None:
        return None
    largest = []
    for block in re.split(r"\n\s*={5,}", message):
        size = re.search(rf"Size: {_SIZE}", block)
        if size is None:
            continue
        shape = re.search(r"Shape: (\S+?)\{", block)
        name = re.search(r'op_name="([^"]*)"', block)
        largest.append((
            _bytes(*size.groups()), shape.group(1) if shape else "", name.group(1) if name else ""
        ))  # fmt: skip
    used, limit = _bytes(*found.groups()[:2]), _bytes(*found.groups()[2:])
    return OutOfMemory(used=used, limit=limit, largest=tuple(largest))
