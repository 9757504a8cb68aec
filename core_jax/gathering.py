"""What programs and processes have made, whole in every process."""

import contextlib
import pathlib
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Piece = TypeVar("Piece")
Made = TypeVar("Made")
_SMALLEST = 10  # bits; lengths are rounded up to a power of two, so that few programs are compiled


def fetch(tree: Any) -> Any:
    """The tree with numpy arrays; every process of a mesh must call it at the same point.

    The compiler chooses where a result lies, so that a process may hold a part of it only, which
    `jax.device_get` refuses.
    """

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def own_share(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """This process's pieces for `in_turns`: every n-th."""
    return pieces[jax.process_index() :: jax.process_count()]


def in_turns(own: Iterable[Piece], total: int, compute: Callable[[Piece], Made]) -> list[Made]:
    """What `compute` makes of all pieces, in order; each is computed by one process.

    Every process calls it at the same point and gets everything. A piece is a batch: computed in
    the same shape, on a process's own devices, whoever does it, so that the bytes do not depend on
    the number of processes.

    Args:
      own: this process's pieces, as `own_share` picks them.
      total: pieces of all processes.
      compute: makes something that can be pickled.

    Raises:
      Exception: what `compute` or the pieces raised, wherever that was, on every process: they
        stay in step.
    """
    index, count = jax.process_index(), jax.process_count()
    pieces, found = iter(own), []
    for first in range(0, total, count):
        mine, error = None, None
        try:
            mine = compute(next(pieces)) if first + index < total else None
        except Exception as raised:
            error = raised
        everyone = _everyones((mine, _that_travels(error)))
        if error is not None:
            raise error
        for _, told in everyone:
            if told is not None:
                raise told
        found += [value for value, _ in everyone][: total - first]
    return found


def _that_travels(error: Exception | None) -> Exception | None:
    """The error, or one that says the same, as it arrives at other processes."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class makes of it
        return RuntimeError(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def first_writes(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder to write to: `out` in process 0, one that is thrown away in the others.

    For jobs in which all processes make the same files.
    """
    if jax.process_index() == 0:
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder)


def first_says(line: str) -> None:
    """Prints a line, in process 0 alone."""
    if jax.process_index() == 0:
        print(line, flush=True)


def _everyones(value: Any) -> list[Any]:
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array([len(data)]))).reshape(-1)
    padded = np.zeros(1 << max(_SMALLEST, int(lengths.max() - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [pickle.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]
