"""The header of a safetensors file: where each tensor's bytes lie; read and made."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

# In the order in which the format lays tensors out: the widest first, so that all are aligned.
_DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in (
        ("U64", np.uint64), ("I64", np.int64), ("F64", np.float64), ("F32", np.float32),
        ("U32", np.uint32), ("I32", np.int32), ("BF16", ml_dtypes.bfloat16), ("F16", np.float16),
        ("U16", np.uint16), ("I16", np.int16), ("I8", np.int8), ("U8", np.uint8),
        ("BOOL", np.bool_),
    )
}  # fmt: skip
_NAMES = {kind: name for name, kind in _DTYPES.items()}
_ALIGNMENT = 8


class CheckpointFormatError(ValueError):
    """A directory holds no readable safetensors; the message has the remedy."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
      shape: of the tensor.
      dtype: of its elements.
      offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: pathlib.Path) -> dict[str, Stored]:
    """What a file holds, by name; none of the tensors is read.

    Raises:
      CheckpointFormatError: it is damaged or cut short, or has a type that we can't read.
    """
    try:
        with safe_open(file, framework="numpy"):  # checks names, offsets and the file's length
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointFormatError(
            f"{file} is not a whole safetensors file ({error}); download or export it again"
        ) from error
    found = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        if about["dtype"] not in _DTYPES:
            raise CheckpointFormatError(
                f"{file}: tensor {name} has type {about['dtype']}, which is not supported; "
                "convert it to F32, F16 or BF16"
            )
        offset = 8 + length + about["data_offsets"][0]
        found[name] = Stored(tuple(about["shape"]), _DTYPES[about["dtype"]], offset)
    return found


def make_header(
    tensors: Sequence[tuple[str, tuple[int, ...], np.dtype]],
) -> tuple[bytes, dict[str, Stored]]:
    """The first bytes of a file, the same that the safetensors package writes.

    Args:
      tensors: name, shape and type of each.

    Returns:
      The header, and where each tensor's bytes belong.

    Raises:
      ValueError: two tensors have one name, or a type that the format lacks.
    """
    if len({name for name, _, _ in tensors}) < len(tensors):
        raise ValueError("two tensors have the same name")
    if odd := [f"{name} ({kind})" for name, _, kind in tensors if np.dtype(kind) not in _NAMES]:
        raise ValueError(f"safetensors has no type for {', '.join(odd)}")
    rank = list(_DTYPES).index
    ordered = sorted(tensors, key=lambda t: (rank(_NAMES[np.dtype(t[2])]), t[0].encode()))
    about: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, at = {}, 0
    for name, shape, kind in ordered:
        places[name] = Stored(tuple(shape), np.dtype(kind), at)
        end = at + places[name].nbytes
        about[name] = {"dtype": _NAMES[np.dtype(kind)], "shape": list(shape),
                       "data_offsets": [at, end]}  # fmt: skip
        at = end
    text = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    moved = {n: dataclasses.replace(s, offset=s.offset + len(head)) for n, s in places.items()}
    return head, moved


def read_at(descriptor: int, target: memoryview, offset: int, *, where: str) -> None:
    """Fills `target` with the bytes of a file from `offset` on.

    A plain read, not a mapping: a file that is cut short is an error and no signal, and the
    process's own count of bytes read (`rchar`) is the truth.

    Raises:
      CheckpointFormatError: the file ends before.
    """
    done = 0
    while done < len(target):
        count = _read_some(descriptor, target[done:], offset + done)
        if not count:
            raise CheckpointFormatError(f"{where} became shorter while it was read")
        done += count


def _read_some(descriptor: int, target: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], offset)
    data = os.pread(descriptor, len(target), offset)  # macOS: one copy more
    target[: len(data)] = data
    return len(data)
