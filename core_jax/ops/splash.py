"""Attention by TPU's fused kernel (Pallas' splash attention), which never holds the logits.

It takes masks whose structure is known beforehand: all keys, `Causal`, or `Segments`. Under a mesh
the kernel runs on each device's own rows and heads (`jax.shard_map`), since no compiler can split
it.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from core_jax.sharding import DEFAULT_RULES

# Rows of a tile of the TPU's memory; lengths are padded to a multiple.
_LANES = 128
_LARGEST_BLOCK = 512
# Heads of this size or a multiple are taken as they are; larger ones are filled up with zeros.
_HEAD = 64
# What a policy of rematerialisation calls the kernel's results (core_jax.nn.stack).
SAVED_NAME = "attention"

_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs the kernel's program step by step on any device, slowly: for tests."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Causal:
    """The mask of a sequence that sees itself: query i sees keys 0..i. It holds no array."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """The mask of sequences packed into a row: a token sees those of its own segment.

    Attributes:
      ids: int [B, T], of each token's segment.
    """

    ids: Int[Array, "B T"]


Structure = Causal | Segments | None


def kernel_fits(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], *, mask: Structure
) -> bool:
    """Whether the kernel can do this, on the mesh that is set.

    Heads have to fill half a tile at least, sequences a whole one, or it is not worth it; rows
    have to divide over the mesh.
    """
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    if H < _HEAD or min(T, S) < _LANES or (mask is not None and T != S):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or q.shape[0] % math.prod(mesh.shape[n] for n in _row_axes(mesh)) == 0


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Structure,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attention where `kernel_fits`.

    Args:
      q: queries.
      k: keys.
      v: values; N query heads share K key-value heads.
      mask: None sees everything.
      scale: factor on the logits.
    """
    # As in `dot_product_attention`: the factor stays float32.
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _on_one_device(q, k, v, mask)
    split = "tensor" in mesh.shape and k.shape[2] % mesh.shape["tensor"] == 0
    heads = "tensor" if split else None
    rows = _row_axes(mesh) or None
    spec = PartitionSpec(rows, None, heads, None)
    # The kernel says nothing of how its results vary over a mesh, so that is not checked.
    return jax.shard_map(
        _on_one_device, mesh=mesh, in_specs=(spec, spec, spec, PartitionSpec(rows, None)),
        out_specs=spec, check_vma=False,
    )(q, k, v, mask)  # fmt: skip


def _row_axes(mesh) -> tuple[str, ...]:
    """Mesh axes that split a batch."""
    names = DEFAULT_RULES["batch"]
    return tuple(n for n in names or () if n in mesh.shape)


def _on_one_device(q, k, v, mask: Structure):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, S, N, H = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    q, k, v = (_padded(x).transpose(0, 2, 1, 3) for x in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    kind = masks.CausalMask if isinstance(mask, Causal) else masks.FullMask
    over_queries, over_keys = _block(queries), _block(keys)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([kind((queries, keys))] * N), head_shards=1, q_seq_shards=1,
        residual_checkpoint_name=SAVED_NAME, interpret=_interpreted.get(),
        block_sizes=kernel.BlockSizes(
            block_q=over_queries, block_kv=over_keys, block_kv_compute=over_keys,
            block_q_dkv=over_queries, block_kv_dkv=over_keys, block_kv_dkv_compute=over_keys,
            block_q_dq=over_queries, block_kv_dq=over_keys,
        ),
    )  # fmt: skip
    segments, by_row = None, None
    if isinstance(mask, Segments):  # what fills the row up sees itself, and nobody else does
        ids = jnp.pad(mask.ids, ((0, 0), (0, queries - T)), constant_values=-1)
        segments, by_row = kernel.SegmentIds(q=ids, kv=ids), 0
    elif mask is None and keys > S:  # nobody sees a padded key; a causal query never reaches one
        segments = kernel.SegmentIds(
            q=jnp.zeros((queries,), jnp.int32), kv=(jnp.arange(keys) >= S).astype(jnp.int32)
        )
    out: Any = jax.vmap(attend, in_axes=(0, 0, 0, by_row))(q, k, v, segments)
    return out.transpose(0, 2, 1, 3)[:, :T, :, :H]


def _padded(x):
    """[B, T, N, H] with T a multiple of a tile's rows, and heads that fill half tiles."""
    T, H = x.shape[1], x.shape[3]
    wider = -H % _LANES if H % _HEAD else 0
    return jnp.pad(x, ((0, 0), (0, -T % _LANES), (0, 0), (0, wider)))


def _block(length: int) -> int:
    """The largest block that divides a padded length."""
    sizes = range(_LANES, min(length, _LARGEST_BLOCK) + 1, _LANES)
    return max(size for size in sizes if length % size == 0)
