"""Parameters as the blocks of stored tensors: the host holds one tensor's values at a time."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from core_jax.convert.boxes import BLOCK_BYTES, Box
from core_jax.convert.rules import Entry, inverse
from core_jax.convert.shards_in import box_of, layer_sharding, shares_memory

# A slice that processes exchange; every device holds one, and the exchange several more. 16 MiB
# took 400 MB more at the peak (two processes of four CPU devices), and no less time.
GATHERED_BYTES = 4 * 2**20

# A part of an array that is on the host, and where in the array it belongs.
Piece = tuple[Box, np.ndarray]


def is_spread(leaf: Any) -> bool:
    """Whether an array has parts that only other processes can reach."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def stored_blocks(leaf: Any, entry: Entry, dtype: np.dtype) -> Iterator[np.ndarray]:
    """A stored tensor's elements in C order.

    Args:
      leaf: the parameter: a numpy array, or a jax.Array on any mesh. Where it is spread over
        several processes all of them must come here, for the same entries in the same order.
      entry: which tensor of it.
      dtype: to store.

    Yields:
      Arrays of some megabytes.
    """
    pieces = []
    for box, array in host_pieces(leaf, entry.layer):
        back = inverse(entry.layout.axes(len(box)))
        pieces.append((tuple(box[i] for i in back), array.transpose(back)))
    if not entry.shape:
        yield pieces[0][1].astype(dtype)
        return
    count, *rest = entry.shape
    row_bytes = int(np.prod(rest, dtype=np.int64)) * dtype.itemsize
    step = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for top in range(0, count, step):
        bottom = min(top + step, count)
        block = np.empty((bottom - top, *rest), dtype)
        for ((first, end), *others), array in pieces:
            a, b = max(top, first), min(bottom, end)
            if a < b:
                where = (slice(a - top, b - top), *(slice(*edges) for edges in others))
                # Cast before it is transposed: that is faster.
                block[where] = array[a - first : b - first].astype(dtype, copy=False)
        yield block


def host_pieces(leaf: Any, layer: int | None) -> list[Piece]:
    """A parameter, or one layer of a stack, on the host: whole, from one piece or several.

    An array in a device's own memory is copied there first: numpy's copy of an array is kept as
    long as the array lives, and what the caller holds would fill the host.
    """
    if not isinstance(leaf, jax.Array):
        array = np.asarray(leaf)
        array = array if layer is None else array[layer, ...]
        return [(tuple((0, n) for n in array.shape), array)]
    if is_spread(leaf):
        array = gather(leaf, layer)
        return [] if array is None else [(tuple((0, n) for n in array.shape), array)]
    if not shares_memory(leaf.sharding):
        place = leaf.sharding if layer is None else layer_sharding(leaf.sharding, leaf.ndim)
        leaf, layer = _taker(place, layer is None)(leaf, np.int32(layer or 0)), None
    pieces: dict[Box, np.ndarray] = {}
    for shard in leaf.addressable_shards:
        box = box_of(shard.index, leaf.shape)
        if layer is None:
            if box not in pieces:  # replicas are the same
                pieces[box] = np.asarray(shard.data)
        elif box[0][0] <= layer < box[0][1] and box[1:] not in pieces:
            pieces[box[1:]] = np.asarray(shard.data)[layer - box[0][0], ...]
    return list(pieces.items())


def gather(leaf: jax.Array, layer: int | None) -> np.ndarray | None:
    """All of an array (or of one layer) that is spread over processes, on process 0's host.

    Every process must call it. Slices go round, along an axis that is not sharded: a few megabytes
    on each device. Where every axis is sharded, all of it (of the layer) is on every device.

    Raises:
      ValueError: the array lies on no mesh.
    """
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        raise ValueError(f"an array over several processes needs a mesh, not {sharding}")
    shape = leaf.shape if layer is None else leaf.shape[1:]
    spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))[-len(shape) :]
    free = [axis for axis, names in enumerate(spec) if not names]
    axis = max(free, key=lambda i: shape[i], default=0)
    count = shape[axis] if shape else 1
    each = leaf.dtype.itemsize * int(np.prod(shape, dtype=np.int64)) // max(count, 1)
    step = max(1, GATHERED_BYTES // max(each, 1)) if free else max(count, 1)
    host = np.empty(shape, leaf.dtype) if jax.process_index() == 0 else None
    for start in range(0, count, step):
        size = min(step, count - start)
        take = _slicer(NamedSharding(sharding.mesh, PartitionSpec()), layer is None, axis, size)
        part = take(leaf, np.int32(layer or 0), np.int32(start))
        mine = np.asarray(part.addressable_data(0))  # waits: one slice at a time
        if host is not None:
            host[(slice(None),) * axis + (slice(start, start + size),) if shape else ()] = mine
    return host


@functools.cache
def _slicer(sharding: Any, whole: bool, axis: int, size: int) -> Any:
    """Jitted (array, layer, start) -> a slice on every device."""

    def take(array, layer, start):
        if not whole:
            array = jax.lax.dynamic_index_in_dim(array, layer, 0, keepdims=False)
        if not array.ndim:
            return array
        return jax.lax.dynamic_slice_in_dim(array, start, size, axis)

    return jax.jit(take, out_shardings=sharding)


@functools.cache
def _taker(sharding: Any, whole: bool) -> Any:
    """Jitted (array, number) -> a copy of the array, or of one of its layers."""

    def take(array, number):
        if whole:
            return jax.numpy.copy(array)
        return jax.lax.dynamic_index_in_dim(array, number, 0, keepdims=False)

    return jax.jit(take, out_shardings=sharding)
