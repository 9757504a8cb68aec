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
        # Every process gets all of it, a layer at a time.
        own = _taker(NamedSharding(_mesh(leaf), PartitionSpec()), layer is None)(
            leaf, np.int32(layer or 0)
        )
        return [(tuple((0, n) for n in own.shape), np.asarray(own.addressable_data(0)))]
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


def _mesh(leaf: jax.Array) -> Any:
    if not isinstance(leaf.sharding, NamedSharding):
        raise ValueError(f"an array over several processes needs a mesh, not {leaf.sharding}")
    return leaf.sharding.mesh


@functools.cache
def _taker(sharding: Any, whole: bool) -> Any:
    """Jitted (array, number) -> a copy of the array, or of one of its layers."""

    def take(array, number):
        if whole:
            return jax.numpy.copy(array)
        return jax.lax.dynamic_index_in_dim(array, number, 0, keepdims=False)

    return jax.jit(take, out_shardings=sharding)
