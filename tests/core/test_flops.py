"""Counting operations on a trace."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from core_jax.flops import count_flops


def _shape(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_counts_two_operations_a_multiply_add():
    assert count_flops(lambda a, b: a @ b, _shape(3, 4), _shape(4, 5)) == 2 * 3 * 4 * 5
    batched = count_flops(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), _shape(7, 3, 4), _shape(7, 4, 5)
    )
    assert batched == 7 * 2 * 3 * 4 * 5


def test_the_gradient_of_a_product_is_two_more():
    def loss(a, b):
        return jnp.sum(jax.jit(jnp.matmul)(a, b))

    forward = count_flops(loss, _shape(3, 4), _shape(4, 5))
    assert count_flops(jax.grad(loss, (0, 1)), _shape(3, 4), _shape(4, 5)) >= 2 * forward


def test_a_scan_counts_every_round():
    def layers(x, kernels):
        return jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, kernels)[0]

    one = 2 * 2 * 4 * 4
    assert count_flops(layers, _shape(2, 4), _shape(6, 4, 4)) == 6 * one
    # The gradient with respect to the input: forward, and one product a layer back.
    pulled = jax.grad(lambda x, k: jnp.sum(layers(x, k)))
    assert count_flops(pulled, _shape(2, 4), _shape(6, 4, 4)) == 2 * 6 * one


def test_cond_counts_its_dearest_branch():
    def choose(p, x):
        return jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert count_flops(choose, jax.ShapeDtypeStruct((), bool), _shape(4, 4)) == 2 * 2 * 4**3


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_kernel_counts_every_block_on_every_device(mesh):
    """The fused kernel's forward pass has plain attention's products."""
    from core_jax.ops.attention import dot_product_attention
    from core_jax.ops.splash import Causal
    from core_jax.sharding import make_mesh

    def count(backend):
        def attend(q):
            return dot_product_attention(q, q, q, mask=Causal(), backend=backend)

        return count_flops(attend, _shape(4, 1024, 2, 128))

    with jax.set_mesh(make_mesh(mesh)) if mesh else contextlib.nullcontext():
        assert count("splash") == count("xla") == 2 * 2 * 4 * 2 * 1024**2 * 128


def test_a_convolution_is_its_matrix_product():
    from core_jax.ops.conv import conv2d

    x, kernel = _shape(2, 8, 8, 3), _shape(3, 3, 3, 5)
    padding = ((1, 1), (1, 1))
    counts = {
        backend: count_flops(
            lambda x, k, b=backend: conv2d(x, k, stride=2, padding=padding, backend=b), x, kernel
        )
        for backend in ("xla", "im2col")
    }
    assert counts["xla"] == counts["im2col"] == 2 * 2 * 4 * 4 * 9 * 3 * 5


def test_zeros_between_strides_do_not_count():
    from core_jax.ops.conv import conv2d

    def loss(x, k):
        return jnp.sum(conv2d(x, k, stride=2))

    x, kernel = _shape(1, 9, 9, 2), _shape(3, 3, 2, 4)
    forward = count_flops(loss, x, kernel)
    back = count_flops(jax.grad(loss), x, kernel) - forward
    # The gradient's own products; without the rule there would be four times as many. At the
    # borders some are with padding.
    assert forward <= back < 1.3 * forward


def test_depthwise_convolutions_have_one_input_an_output():
    from core_jax.ops.conv import conv2d

    flops = count_flops(
        lambda x, k: conv2d(x, k, padding=((1, 1), (1, 1)), groups=6),
        _shape(1, 4, 4, 6), _shape(3, 3, 1, 6),
    )  # fmt: skip
    assert flops == 2 * 4 * 4 * 6 * 9
