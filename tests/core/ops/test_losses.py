"""Losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.ops.losses import chunked_token_cross_entropy, token_cross_entropy
from tests.oracle import close, relative_error


def _problem():
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(2, 10, 8)), rng.normal(size=(37, 8))
    targets = rng.integers(0, 37, (2, 10))
    return jnp.float32(hidden), jnp.float32(table), jnp.int32(targets)


@pytest.mark.parametrize("chunk", [1, 4, 5, 64])
def test_chunks_change_neither_losses_nor_gradients(chunk):
    hidden, table, targets = _problem()
    weights = jnp.linspace(0.0, 1.0, 20).reshape(2, 10)

    def whole(hidden, table):
        logits = hidden @ table.T
        losses = token_cross_entropy(logits, targets)
        return jnp.sum(losses * weights), (losses, jnp.argmax(logits, axis=-1) == targets)

    def chunked(hidden, table):
        losses, correct = chunked_token_cross_entropy(hidden, table, targets, chunk=chunk)
        return jnp.sum(losses * weights), (losses, correct)

    (_, (want, hits)), grads = jax.jit(jax.value_and_grad(whole, (0, 1), has_aux=True))(
        hidden, table
    )
    (_, (got, correct)), chunk_grads = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(
        hidden, table
    )
    assert close(got, want, 1e-6)
    np.testing.assert_array_equal(correct, hits)
    for a, b in zip(chunk_grads, grads, strict=True):
        assert close(a, b, 1e-5)
    other, _ = chunked_token_cross_entropy(hidden, table, targets[:, ::-1], chunk=chunk)
    assert relative_error(other, want) > 1e-3


def test_all_logits_never_exist():
    abstract = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((2, 256, 8), jnp.float32), ((999, 8), jnp.float32), ((2, 256), jnp.int32))
    ]

    def loss(hidden, table, targets):
        return jnp.sum(chunked_token_cross_entropy(hidden, table, targets, chunk=16)[0])

    text = jax.jit(jax.grad(loss, (0, 1))).lower(*abstract).compile().as_text()
    assert "[2,256,999]" not in text
    assert "[16,2,16,999]" not in text  # nor stacked chunk by chunk for the backward pass
    assert "2,16,999]" in text
