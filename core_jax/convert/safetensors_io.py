"""Safetensors directories, tensor by tensor; never a pickle."""

import json
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
MAX_SHARD_BYTES = 5 * 10**9

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip


class CheckpointFormatError(ValueError):
    """A directory holds no readable safetensors; the message has the remedy."""


class TensorReader:
    """The tensors of a directory's safetensors files, read one at a time.

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
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._file_of: dict[str, pathlib.Path] = {}
        self._handles: dict[pathlib.Path, safe_open] = {}
        for file in _weight_files(self.directory):
            self._read_header(file)

    def _read_header(self, file: pathlib.Path) -> None:
        try:
            handle = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise CheckpointFormatError(
                f"{file} is not a whole safetensors file ({error}); download or export it again"
            ) from error
        self._handles[file] = handle
        for name in handle.keys():  # noqa: SIM118 - not a mapping
            if name in self._file_of:
                raise CheckpointFormatError(
                    f"tensor {name} is in both {self._file_of[name].name} and {file.name}; "
                    "remove the file that does not belong to this checkpoint"
                )
            view = handle.get_slice(name)
            dtype = view.get_dtype()
            if dtype not in _DTYPES:
                raise CheckpointFormatError(
                    f"{file}: tensor {name} has type {dtype}, which is not supported; "
                    "convert it to F32, F16 or BF16"
                )
            self._file_of[name] = file
            self.shapes[name] = tuple(view.get_shape())
            self.dtypes[name] = np.dtype(_DTYPES[dtype])

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored type."""
        return self._handles[self._file_of[name]].get_tensor(name)


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


def write_tensors(
    directory: str | os.PathLike,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    file_name: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes tensors as one file, or as shards with an index past `max_shard_bytes`.

    Each file appears under its final name only when it is whole.

    Args:
      directory: exists.
      tensors: (name, array); consumed lazily, one shard in memory at a time.
      file_name: such as 'model.safetensors'.
      max_shard_bytes: upper limit of a shard (a larger single tensor gets a shard of its own).
    """
    directory = pathlib.Path(directory)
    stem = file_name.removesuffix(".safetensors")
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as scratch:
        shards, total = [], 0
        for number, shard in enumerate(_shards(tensors, max_shard_bytes)):
            path = pathlib.Path(scratch) / f"{number}.safetensors"
            save_file({n: np.ascontiguousarray(a) for n, a in shard.items()}, path,
                      metadata={"format": "pt"})
            path.chmod(_default_mode(scratch))
            total += sum(a.nbytes for a in shard.values())
            shards.append((path, list(shard)))
        _remove_old(directory, stem)
        if len(shards) == 1:
            shutil.move(shards[0][0], directory / file_name)
            return
        weight_map = {}
        for number, (path, names) in enumerate(shards, start=1):
            final = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            shutil.move(path, directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / f"{file_name}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _default_mode(scratch: str) -> int:
    """What a new file may be here; safetensors writes files that only their owner can read."""
    probe = pathlib.Path(scratch) / "mode"
    probe.touch()
    return stat.S_IMODE(probe.stat().st_mode)


def _shards(
    tensors: Iterable[tuple[str, np.ndarray]], limit: int
) -> Iterator[Mapping[str, np.ndarray]]:
    shard, size = {}, 0
    for name, array in tensors:
        if shard and size + array.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def _remove_old(directory: pathlib.Path, stem: str) -> None:
    for old in [*directory.glob(f"{stem}.safetensors*"), *directory.glob(f"{stem}-*.safetensors")]:
        old.unlink()
