"""The TPU's fused attention, interpreted on CPUs, against plain attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.ops.attention import causal_mask, dot_product_attention, segment_mask
from core_jax.ops.splash import Causal, Segments, interpreted, kernel_fits
from core_jax.sharding import make_mesh

TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def draw(rows=2, queries=150, keys=150, heads=4, kv_heads=2, size=64):
    rng = np.random.default_rng(0)
    shapes = ((rows, queries, heads, size), *[(rows, keys, kv_heads, size)] * 2)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def outputs(arrays, mask, backend):
    """The result, and gradients of a sum with weights that differ everywhere."""

    def loss(q, k, v):
        out = dot_product_attention(q, k, v, mask=mask, backend=backend)
        return jnp.sum(out * jnp.sin(jnp.arange(out.size).reshape(out.shape))), out

    grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return [out, *grads]


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE)


@pytest.mark.parametrize(
    ("sizes", "causal"),
    [
        ({}, True), ({}, False), ({"queries": 128, "keys": 200}, False), ({"size": 128}, True),
        ({"size": 80, "kv_heads": 4}, False),
    ],
    ids=["causal", "padded keys", "cross", "128", "padded heads"],
)
def test_results_and_gradients_are_plain_attention_s(sizes, causal):
    arrays = draw(**sizes)
    mask = Causal() if causal else None
    assert kernel_fits(*arrays[:2], mask=mask)
    with interpreted():
        ours = outputs(arrays, mask, "splash")
    theirs = outputs(arrays, causal_mask(arrays[0].shape[1]) if causal else None, "xla")
    same(ours, theirs)
    if causal:  # a control: it is the mask that makes them equal
        with pytest.raises(AssertionError):
            same(ours, outputs(arrays, None, "xla"))


def packed(rows, length):
    """Segments of unequal length, other ones in each row; 0 at the end is padding."""
    ends = np.array([[40 + 17 * row, 100 + 5 * row, 140] for row in range(rows)])
    return jnp.asarray(1 + (np.arange(length) >= ends[:, :, None]).sum(1), jnp.int32) % 4


def test_packed_sequences_see_themselves():
    arrays, ids = draw(size=80, kv_heads=4), packed(2, 150)
    assert kernel_fits(*arrays[:2], mask=Segments(ids))
    with interpreted():
        ours = outputs(arrays, Segments(ids), "splash")
    same(ours, outputs(arrays, segment_mask(ids), "xla"))
    same(ours, outputs(arrays, Segments(ids), "xla"))
    with pytest.raises(AssertionError):  # a control: one token in another segment
        same(ours, outputs(arrays, segment_mask(ids.at[1, 60].set(1)), "xla"))


def test_segments_stay_with_their_rows():
    arrays, ids = draw(rows=4, queries=140, keys=140), packed(4, 140)
    mesh = make_mesh({"data": 4, "tensor": 2})
    with interpreted(), jax.set_mesh(mesh):
        ours = jax.jit(
            lambda q, k, v, ids: dot_product_attention(q, k, v, mask=Segments(ids),
                                                       backend="splash")
        )(*arrays, ids)  # fmt: skip
    theirs = dot_product_attention(*arrays, mask=segment_mask(ids))
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def test_rows_and_heads_stay_on_their_devices():
    arrays = draw(rows=4, queries=128, keys=128)
    mesh = make_mesh({"data": 4, "tensor": 2})
    with interpreted(), jax.set_mesh(mesh):
        run = jax.jit(lambda q, k, v: dot_product_attention(q, k, v, mask=Causal(),
                                                           backend="splash"))  # fmt: skip
        ours = run(*arrays)
        assert not kernel_fits(*draw(rows=3)[:2], mask=Causal())  # rows do not divide
    assert ours.sharding.shard_shape(ours.shape) == (1, 128, 2, 64)
    theirs = dot_product_attention(*arrays, mask=causal_mask(128))
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize(
    "sizes", [{"size": 32}, {"queries": 77, "keys": 77}], ids=["head size", "short"]
)
def test_where_the_kernel_does_not_fit_the_compiler_s_attention_is_used(sizes):
    arrays = draw(**sizes)
    ours = dot_product_attention(*arrays, mask=Causal(), backend="splash")
    theirs = dot_product_attention(*arrays, mask=causal_mask(arrays[0].shape[1]))
    np.testing.assert_array_equal(ours, theirs)


def test_masks_that_are_arrays_are_left_to_the_compiler():
    arrays = draw()
    mask = causal_mask(150) & (jnp.arange(150) > 3)[None, None]
    ours = dot_product_attention(*arrays, mask=mask, backend="splash")
    np.testing.assert_array_equal(ours, dot_product_attention(*arrays, mask=mask))
    with pytest.raises(AssertionError):  # a control: that mask is not `Causal`
        np.testing.assert_allclose(ours, dot_product_attention(*arrays, mask=Causal()))
