"""Safetensors directories, read tensor by tensor or part by part; never a pickle."""

import json
import os
import pathlib
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from core_jax.convert.boxes import BLOCK_BYTES, Block, Box, plan_blocks
from core_jax.convert.header import CheckpointFormatError, Stored, read_at, read_header

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


class TensorReader:
    """The tensors of a directory's safetensors files, of which bytes are read only when asked for.

    Attributes:
      shapes: tensor name -> shape.
      dtypes: tensor name -> numpy type as stored.
    """

    def __init__(self, directory: str | os.PathLike):
        """Opens the headers.

        Args:
          directory: has one or many .safetensors files, with or without an index; or one such
            file.

        Raises:
          CheckpointFormatError: no safetensors, only pickles, a damaged file, a file that the
            index names is missing, or one tensor name in two files.
        """
        self.directory = pathlib.Path(directory)
        self._files: list[pathlib.Path] = []
        # Kept open: a file that is replaced meanwhile would not fit the header that was read.
        self._descriptors: list[int] = []
        self._places: dict[str, tuple[int, Stored]] = {}
        weakref.finalize(self, _close, self._descriptors)
        for file in _weight_files(self.directory):
            self._open(file)
        self.shapes = {name: stored.shape for name, (_, stored) in self._places.items()}
        self.dtypes = {name: stored.dtype for name, (_, stored) in self._places.items()}

    def _open(self, file: pathlib.Path) -> None:
        header = read_header(file)
        self._descriptors.append(os.open(file, os.O_RDONLY))
        self._files.append(file)
        for name, stored in header.items():
            if name in self._places:
                other = self._files[self._places[name][0]]
                raise CheckpointFormatError(
                    f"tensor {name} is in both {other.name} and {file.name}; "
                    "remove the file that does not belong to this checkpoint"
                )
            self._places[name] = len(self._files) - 1, stored

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored type."""
        array = np.empty(self.shapes[name], self.dtypes[name])
        self._read(name, 0, array.reshape(-1).view(np.uint8))
        return array

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """One tensor's elements in their stored order, as many at a time for every type."""
        dtype, size = self.dtypes[name], int(np.prod(self.shapes[name], dtype=np.int64))
        step = BLOCK_BYTES // 8
        for start in range(0, size, step):
            chunk = np.empty(min(step, size - start), dtype)
            self._read(name, start * dtype.itemsize, chunk.view(np.uint8))
            yield chunk

    def read_into(self, name: str, boxes: Sequence[Box], targets: Sequence[np.ndarray]) -> None:
        """Reads parts of a tensor, and no other bytes (see core_jax.convert.boxes).

        Args:
          name: of the tensor.
          boxes: (start, stop) for each of its axes.
          targets: an array of each box's shape, of any strides; values are cast to its type.
        """
        shape = self.shapes[name]
        missing = max(0, 2 - len(shape))  # a vector is a column
        shape += (1,) * missing
        boxes = [(*box, *((0, 1),) * missing) for box in boxes]
        targets = [target.reshape(target.shape + (1,) * missing) for target in targets]
        for block in plan_blocks(shape, self.dtypes[name].itemsize, boxes):
            data = self._block(name, shape, block)
            for i in block.boxes:
                _copy_share(data, block, boxes[i], targets[i])

    def _block(self, name: str, shape: tuple[int, ...], block: Block) -> np.ndarray:
        """[rows, columns, *the other axes] of a tensor."""
        (top, bottom), (left, right) = block.rows, block.columns
        dtype = self.dtypes[name]
        cell = int(np.prod(shape[2:], dtype=np.int64)) * dtype.itemsize
        row, run, count = shape[1] * cell, (right - left) * cell, bottom - top
        first = top * row + left * cell
        if block.whole:
            raw = np.empty(count * row, np.uint8)
            self._read(name, first, raw[: (count - 1) * row + run])
            # Rows begin at their first needed column, so that the rest of each stands behind it.
            data = raw.reshape(count, row)[:, :run]
        else:
            data = np.empty((count, run), np.uint8)
            for i in range(count):
                self._read(name, first + i * row, data[i])
        return data.view(dtype).reshape(count, right - left, *shape[2:])

    def _read(self, name: str, start: int, target: np.ndarray) -> None:
        number, stored = self._places[name]
        read_at(
            self._descriptors[number], target.data, stored.offset + start,
            where=str(self._files[number]),
        )  # fmt: skip


def _copy_share(data: np.ndarray, block: Block, box: Box, target: np.ndarray) -> None:
    """Copies from a block what belongs to a box; `target` has the box's shape."""
    (top, bottom), left = block.rows, block.columns[0]
    rows, columns, *rest = box
    share = data[(slice(None), slice(columns[0] - left, columns[1] - left),
                  *(slice(*edges) for edges in rest))]  # fmt: skip
    if share.dtype != target.dtype:
        share = share.astype(target.dtype)  # before it is transposed: that is faster
    target[top - rows[0] : bottom - rows[0]] = share


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    if directory.is_file() and directory.suffix == ".safetensors":
        return [directory]
    if directory.is_file() and directory.suffix in PICKLE_SUFFIXES:
        raise CheckpointFormatError(_pickle_remedy(f"{directory} is a pickle file"))
    if not directory.is_dir():
        raise CheckpointFormatError(f"{directory} is not a directory")
    index = _index(directory)
    if index is not None:
        return [_listed_file(directory, index, name) for name in _listed(index)]
    files = sorted(directory.glob("*.safetensors"))
    if len(files) > 1:
        # Hub directories often hold the same weights several times (fp16 variants, adapters).
        known = [f for f in files if f.name in CANONICAL_FILES]
        files = known[:1] if known else files
    if files:
        return files
    pickles = sorted(f.name for f in directory.iterdir() if f.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointFormatError(_pickle_remedy(f"{directory} holds only {', '.join(pickles)}"))
    raise CheckpointFormatError(f"{directory} holds no .safetensors file")


def _pickle_remedy(found: str) -> str:
    return (
        f"{found}. Pickle files can run code when they are read, so they are refused. Use the "
        "repository's safetensors revision, or convert once in a sandbox as "
        "docs/converting-pickles.md shows"
    )


CANONICAL_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")


def _index(directory: pathlib.Path) -> pathlib.Path | None:
    """The index to follow; an unsharded canonical file beats the index of a variant."""
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    for index in indexes:
        if index.name.removesuffix(".index.json") in CANONICAL_FILES:
            return index
    if any((directory / name).is_file() for name in CANONICAL_FILES):
        return None
    return indexes[0] if indexes else None


def _listed(index: pathlib.Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointFormatError(
            f"{index} is damaged: it must be JSON with a weight_map of tensor names to file names; "
            "download it again"
        ) from error


def _listed_file(directory: pathlib.Path, index: pathlib.Path, name: str) -> pathlib.Path:
    if name != pathlib.PurePath(name).name:
        raise CheckpointFormatError(
            f"{index} names {name!r}, which is outside {directory}; an index may only name files "
            "beside itself, so this one is refused"
        )
    if not (directory / name).is_file():
        raise CheckpointFormatError(
            f"{index.name} names {name}, which is not in {directory}; the download is incomplete"
        )
    return directory / name
