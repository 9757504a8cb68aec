"""Whether a compiled step is laid out as it should be: what no device should hold whole."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from launch.collectives import Collective, gathered_at_once
from launch.compiling import Compiled, Lowered

# Small arrays are replicated on purpose (core_jax.sharding.fsdp_by_size), and a network of a few
# layers has large ones.
_SHARE_GATHERED = 0.5
_SHARE_REPLICATED = 0.05


def layout_problems(lowered: Lowered, compiled: Compiled) -> tuple[str, ...]:
    """What is wrong with a step's layout, in sentences; empty if nothing is.

    Args:
      lowered: the step.
      compiled: what the compiler made of it.
    """
    if len(lowered.slices) == 1:
        return ()
    parts = lowered.call.parts
    return (
        *_gathers(compiled.collectives, whole_bytes(parts.get("frozen"))),
        *_optimizer(lowered.replicated_optimizer, whole_bytes(parts.get("optimizer"))),
    )


def whole_bytes(tree: Any) -> int:
    """Bytes of all arrays, wherever their shards are."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize for x in leaves)


def _gathers(collectives: list[Collective], frozen: int) -> Iterable[str]:
    largest = gathered_at_once(collectives)
    if frozen and largest > _SHARE_GATHERED * frozen:
        yield (
            f"a gather of {largest / 2**20:.0f} MiB puts most of the {frozen / 2**20:.0f} MiB of "
            "frozen weights on every device at once; layers should be gathered one by one"
        )


def _optimizer(replicated: int, optimizer: int) -> Iterable[str]:
    if optimizer and replicated > _SHARE_REPLICATED * optimizer:
        yield (
            f"every device holds {replicated / 2**20:.0f} MiB of the optimizer's "
            f"{optimizer / 2**20:.0f} MiB whole; split it with --config.run.mesh.fsdp=-1"
        )
