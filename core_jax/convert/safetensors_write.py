"""Safetensors files out, block by block: first the header, then each tensor's bytes."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from core_jax.convert.header import make_header

MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A tensor that is to be written.

    Attributes:
      name: as stored.
      shape: of the tensor.
      dtype: of the tensor.
      blocks: gives its elements in C order, in as many arrays as it likes; called once, when it
        is this tensor's turn.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    directory: str | os.PathLike,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    file_name: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`write_stream` of arrays that are in memory.

    Args:
      directory: exists.
      tensors: (name, array).
      file_name: such as 'model.safetensors'.
      max_shard_bytes: upper limit of a shard.
    """
    outgoing = [
        Outgoing(n, a.shape, a.dtype, functools.partial(iter, (a,))) for n, a in tensors
    ]
    write_stream(directory, outgoing, file_name=file_name, max_shard_bytes=max_shard_bytes)


def write_stream(
    directory: str | os.PathLike,
    tensors: Sequence[Outgoing],
    *,
    file_name: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes tensors as one file, or as shards with an index past `max_shard_bytes`.

    Only one block is in memory at a time, and each file appears under its final name only when
    all are whole. The bytes are those that the safetensors package would write.

    Args:
      directory: exists.
      tensors: written in this order, to wherever the format wants them.
      file_name: such as 'model.safetensors'.
      max_shard_bytes: upper limit of a shard (a larger single tensor gets a shard of its own).

    Raises:
      ValueError: two tensors have one name, or one gives more or fewer bytes than it said.
      OSError: there is no room, or the directory refuses; what was there before stays.
    """
    directory = pathlib.Path(directory)
    stem = file_name.removesuffix(".safetensors")
    if len({t.name for t in tensors}) < len(tensors):
        raise ValueError("two tensors have the same name")
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as scratch:
        shards = []
        for number, shard in enumerate(_shards(tensors, max_shard_bytes)):
            path = pathlib.Path(scratch) / f"{number}.safetensors"
            _write_file(path, shard)
            shards.append((path, [t.name for t in shard]))
        _remove_old(directory, stem)
        if len(shards) == 1:
            shutil.move(shards[0][0], directory / file_name)
            return
        weight_map = {}
        for number, (path, names) in enumerate(shards, start=1):
            final = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            shutil.move(path, directory / final)
            weight_map |= dict.fromkeys(names, final)
        total = sum(t.nbytes for t in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / f"{file_name}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Sequence[Outgoing], limit: int) -> Iterator[list[Outgoing]]:
    shard, size = [], 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _write_file(path: pathlib.Path, tensors: Sequence[Outgoing]) -> None:
    header, places = make_header([(t.name, t.shape, t.dtype) for t in tensors])
    with path.open("wb", buffering=0) as file:
        _write_all(file, header)
        for tensor in tensors:
            file.seek(places[tensor.name].offset)
            written = 0
            for block in tensor.blocks():
                if block.dtype != tensor.dtype:
                    raise ValueError(f"{tensor.name}: {block.dtype} instead of {tensor.dtype}")
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
                written += len(data)
                if written <= tensor.nbytes:  # never into the next tensor
                    _write_all(file, data.data)
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes instead of {tensor.nbytes}")


def _write_all(file, data) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _remove_old(directory: pathlib.Path, stem: str) -> None:
    for old in [*directory.glob(f"{stem}.safetensors*"), *directory.glob(f"{stem}-*.safetensors")]:
        old.unlink()
