"""Stored tensors into the shards of a parameter: each process reads what its devices hold.

A parameter of a stack has many stored tensors. On devices with memory of their own it is put
together there, layer by layer, so that the host holds one layer at most; on CPU devices the
host's buffers become the array, without a copy.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from core_jax.convert.boxes import Box
from core_jax.convert.rules import Assignment, inverse
from core_jax.convert.safetensors_io import TensorReader

# XLA's CPU client takes over a buffer that is aligned so, and copies others.
_ALIGNMENT = 64
# Smaller stacks are put together on the host: a compiled program for each form costs more.
STAGED_BYTES = 64 * 2**20


def read_leaf(
    reader: TensorReader,
    parts: Sequence[Assignment],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding | None = None,
) -> jax.Array:
    """A parameter on its devices; returns when the host's buffers are free again.

    Args:
      reader: of the checkpoint.
      parts: the tensors that fill it, one for each layer of a stack.
      shape: of the parameter.
      dtype: of the parameter.
      sharding: where it lies; on the default device, not committed to it, if None.
    """
    if by_layers(parts, shape, dtype, sharding):
        return _read_stack(reader, parts, shape, dtype, sharding)
    if sharding is None:
        boxes = [tuple((0, n) for n in shape)]
        return jax.block_until_ready(
            jax.device_put(fill(reader, parts, shape, dtype, boxes)[boxes[0]])
        )
    indices: Any = sharding.addressable_devices_indices_map(shape).values()
    # Replicas are read once.
    boxes = list(dict.fromkeys(box_of(index, shape) for index in indices))
    buffers = fill(reader, parts, shape, dtype, boxes)

    def shard(index: Any) -> np.ndarray:
        return buffers[box_of(index, shape)]

    return jax.block_until_ready(
        jax.make_array_from_callback(shape, sharding, shard, dtype=dtype)
    )


def box_of(index: Sequence[slice], shape: tuple[int, ...]) -> Box:
    """A shard's index as (start, stop) for each axis."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def fill(
    reader: TensorReader,
    parts: Sequence[Assignment],
    shape: tuple[int, ...],
    dtype: np.dtype,
    boxes: Sequence[Box],
) -> dict[Box, np.ndarray]:
    """Host buffers of a parameter's boxes, each stored tensor read at most once."""
    buffers = {box: aligned_empty([b - a for a, b in box], dtype) for box in boxes}
    for part in parts:
        entry, needed, targets = part.entry, [], []
        for box, buffer in buffers.items():
            if entry.layer is None:
                own, target = box, buffer
            elif box[0][0] <= entry.layer < box[0][1]:
                own, target = box[1:], buffer[entry.layer - box[0][0], ...]
            else:
                continue
            back = inverse(entry.layout.axes(len(own), transpose=part.transpose))
            needed.append(tuple(own[i] for i in back))
            targets.append(target.transpose(back))
        reader.read_into(part.stored_name, needed, targets)
    return buffers


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """A buffer that CPU devices take over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return raw[first : first + size].view(dtype).reshape(shape)


def by_layers(
    parts: Sequence[Assignment], shape: tuple[int, ...], dtype: Any, sharding: Sharding | None
) -> bool:
    """Whether a parameter is put together on its devices, layer by layer."""
    if parts[0].entry.layer is None or shares_memory(sharding):
        return False
    if sharding is not None and not isinstance(sharding, NamedSharding):
        return False
    if sharding is not None and sharding.shard_shape(shape)[0] < shape[0]:
        return False  # whole layers on some devices: nothing for the others to do
    return math.prod(shape) * np.dtype(dtype).itemsize > STAGED_BYTES


def shares_memory(sharding: Sharding | None) -> bool:
    """Whether a device's arrays lie in the host's memory."""
    device = jax.devices()[0] if sharding is None else next(iter(sharding.device_set))
    return device.platform == "cpu"


def _read_stack(
    reader: TensorReader,
    parts: Sequence[Assignment],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding | None,
) -> jax.Array:
    """Layer after layer into zeros on the devices; every process does the same in the same order.

    Beyond the stack itself the devices hold one layer.
    """
    of_layer = None if sharding is None else layer_sharding(sharding, len(shape))
    stack = _maker(shape, np.dtype(dtype), sharding)()
    for part in parts:
        alone = dataclasses.replace(part, entry=dataclasses.replace(part.entry, layer=None))
        layer = read_leaf(reader, [alone], shape[1:], dtype, of_layer)
        # Waiting keeps one layer on the devices, not all of them.
        number = np.int32(part.entry.layer or 0)
        stack = jax.block_until_ready(_setter(sharding)(stack, layer, number))
    return stack


def layer_sharding(sharding: Sharding, rank: int) -> Sharding | None:
    """How one layer of a stack of that rank lies; None leaves it to the compiler."""
    if not isinstance(sharding, NamedSharding):
        return None
    spec = (*sharding.spec, *[None] * (rank - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[1:]))


@functools.cache
def _maker(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _setter(sharding: Sharding | None) -> Any:
    def put(stack, layer, number):
        return jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)
