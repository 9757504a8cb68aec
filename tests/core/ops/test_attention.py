import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.ops.attention import dot_product_attention
from tests.oracle import close


def by_hand(q, k, v, mask):
    """One head of one row at a time."""
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            kv = n // (q.shape[2] // k.shape[2])
            logits = q[b, :, n] @ k[b, :, kv].T / np.sqrt(q.shape[3])
            logits = np.where(mask[b % mask.shape[0]], logits, -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[b, :, n] = weights / weights.sum(-1, keepdims=True) @ v[b, :, kv]
    return out


@pytest.mark.parametrize("rows_of_mask", [1, 2])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_heads_that_share_keys(kv_heads, rows_of_mask):
    rng = np.random.default_rng(kv_heads)
    B, T, S, N, H = 2, 4, 7, 6, 8
    q, k, v = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((B, T, N, H), (B, S, kv_heads, H), (B, S, kv_heads, H))
    )
    mask = rng.random((rows_of_mask, T, S)) < 0.6
    mask[:, :, 0] = True
    got = np.asarray(dot_product_attention(*map(jnp.asarray, (q, k, v)), mask=jnp.asarray(mask)))
    want = by_hand(q, k, v, mask)
    assert close(got, want, 1e-5)
    # Controls: queries at other heads (all share the keys of one), and every key seen.
    assert kv_heads == 1 or not close(got, by_hand(q[:, :, ::-1], k, v, mask)[:, :, ::-1], 1e-3)
    assert not close(got, by_hand(q, k, v, np.ones_like(mask)), 1e-3)


def test_gradients_equal_jax_nn():
    rng = np.random.default_rng(0)
    q, k, v, weights = (
        jnp.asarray(rng.normal(size=(2, 5, heads, 8)), jnp.float32) for heads in (4, 2, 2, 4)
    )

    def grads(attention):
        return jax.grad(lambda *qkv: jnp.sum(attention(*qkv) * weights), (0, 1, 2))(q, k, v)

    for got, want in zip(
        grads(dot_product_attention), grads(jax.nn.dot_product_attention), strict=True
    ):
        assert close(np.asarray(got), np.asarray(want), 1e-5)
