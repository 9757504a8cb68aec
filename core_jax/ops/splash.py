"""Attention by TPU's fused kernel (Pallas' splash attention), which never holds the logits.

It takes masks whose structure is known beforehand: all keys, or `Causal`. Under a mesh the kernel
runs on each device's own rows and heads (`jax.shard_map`), since no compiler can split it.
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
from jaxtyping import Array, Float

from core_jax.sharding import DEFAULT_RULES

# Rows of a tile of the TPU's memory; lengths are padded to a multiple.
_LANES = 128
_LARGEST_BLOCK = 512
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


def kernel_fits(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], *, causal: bool
) -> bool:
    """Whether the kernel can do this, on the mesh that is set.

    Head sizes are those that fill a tile or half of it; sequences shorter than a tile are not worth
    it; rows have to divide over the mesh.
    """
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    if H % 64 or min(T, S) < _LANES or (causal and T != S):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or q.shape[0] % math.prod(mesh.shape[n] for n in _row_axes(mesh)) == 0


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attention where `kernel_fits`.

    Args:
      q: queries.
      k: keys.
      v: values; N query heads share K key-value heads.
      causal: whether query i sees keys 0..i only.
      scale: factor on the logits.
    """
    # As in `dot_product_attention`: the factor stays float32.
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _on_one_device(q, k, v, causal)
    split = "tensor" in mesh.shape and k.shape[2] % mesh.shape["tensor"] == 0
    heads = "tensor" if split else None
    spec = PartitionSpec(_row_axes(mesh) or None, None, heads, None)

    def local(q, k, v):
        return _on_one_device(q, k, v, causal)

    # The kernel says nothing of how its results vary over a mesh, so that is not checked.
    return jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
    )(q, k, v)


def _row_axes(mesh) -> tuple[str, ...]:
    """Mesh axes that split a batch."""
    names = DEFAULT_RULES["batch"]
    return tuple(n for n in names or () if n in mesh.shape)


def _on_one_device(q, k, v, causal: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, S, N = q.shape[1], k.shape[1], q.shape[2]
    q, k, v = (_padded(x).transpose(0, 2, 1, 3) for x in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    one = masks.CausalMask((queries, keys)) if causal else masks.FullMask((queries, keys))
    over_queries, over_keys = _block(queries), _block(keys)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * N), head_shards=1, q_seq_shards=1,
        residual_checkpoint_name=SAVED_NAME, interpret=_interpreted.get(),
        block_sizes=kernel.BlockSizes(
            block_q=over_queries, block_kv=over_keys, block_kv_compute=over_keys,
            block_q_dkv=over_queries, block_kv_dkv=over_keys, block_kv_dkv_compute=over_keys,
            block_q_dq=over_queries, block_kv_dq=over_keys,
        ),
    )  # fmt: skip
    segments = None
    if not causal and keys > S:  # nobody sees a padded key; a causal query never reaches one
        segments = kernel.SegmentIds(
            q=jnp.zeros((queries,), jnp.int32), kv=(jnp.arange(keys) >= S).astype(jnp.int32)
        )
    out: Any = jax.vmap(attend, in_axes=(0, 0, 0, None))(q, k, v, segments)
    return out.transpose(0, 2, 1, 3)[:, :T]


def _padded(x):
    """[B, T, N, H] with T a multiple of a tile's rows."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _LANES), (0, 0), (0, 0)))


def _block(length: int) -> int:
    """The largest block that divides a padded length."""
    sizes = range(_LANES, min(length, _LARGEST_BLOCK) + 1, _LANES)
    return max(size for size in sizes if length % size == 0)
