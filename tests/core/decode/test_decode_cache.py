"""The cache: what is written, seen, forgotten; cached passes against the whole pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.decode import KVCache
from core_jax.decode.cache import write_layer
from tests.core.decode.tiny_qwen2 import left_padded, prompts, tiny_qwen2
from tests.oracle import close, relative_error


def _cache(batch=2, slots=5):
    return KVCache.allocate(
        layers=2, batch=batch, slots=slots, kv_heads=1, head_dim=2, dtype=jnp.float32
    )


def test_positions_and_masks_of_left_and_right_padded_rows():
    valid = jnp.array([[1, 1, 1], [0, 0, 1], [1, 0, 0]], bool)
    cache, positions, mask = _cache(batch=3).claim(valid)
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 0]]
    assert mask[:, 2].astype(int).tolist() == [[1, 1, 1, 0, 0], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert mask[0].astype(int).tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    cache = cache.replace(end=cache.end + 3)
    cache, positions, mask = cache.claim(jnp.ones((3, 1), bool))
    assert positions.tolist() == [[3], [1], [1]]
    assert mask[:, 0].astype(int).tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 0], [1, 0, 0, 1, 0]]


def test_rows_advance_on_their_own_after_a_rewind():
    cache = _cache().claim(jnp.ones((2, 4), bool))[0].replace(end=jnp.int32(4))
    cache = cache.rewind(jnp.array([3, 1]))
    assert cache.valid.astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    cache, positions, mask = cache.claim(jnp.ones((2, 2), bool))
    assert positions.tolist() == [[3, 4], [1, 2]]
    assert mask[1].astype(int).tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    new = jnp.arange(1.0, 9.0).reshape(2, 2, 1, 2)
    k = write_layer(cache.k, new, jnp.int32(1), cache.end)
    assert k[1, :, :, 0, 0].tolist() == [[0, 0, 0, 1, 3], [0, 5, 7, 0, 0]]
    assert not k[0].any()


def test_take_rows_leaves_the_shared_slots():
    cache = _cache(batch=3, slots=3)
    rows = jnp.arange(3.0)[None, :, None, None, None]
    cache = cache.replace(k=cache.k + rows, v=cache.v - rows)
    got = cache.take_rows(jnp.array([2, 0, 0]), shared=1)
    assert got.k[0, :, :, 0, 0].tolist() == [[0, 2, 2], [1, 0, 0], [2, 0, 0]]
    assert got.v[1, :, :, 0, 0].tolist() == [[0, -2, -2], [-1, 0, 0], [-2, 0, 0]]
    assert cache.repeat(2).k[0, :, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


def _run(model, params, cache, ids, valid):
    cache, positions, mask = cache.claim(jnp.asarray(valid))
    embeds = model.apply({"params": params}, ids, method="embed")
    hidden, cache = model.apply(
        {"params": params}, embeds, positions, mask, cache, method="hidden_states"
    )
    return model.apply({"params": params}, hidden, method="logits"), cache


@pytest.mark.parametrize("per_row", [False, True])
def test_cached_passes_equal_the_whole_pass(per_row):
    _, model, params = tiny_qwen2()
    ids, valid = left_padded(batch=3, length=14)
    ids = jnp.asarray(ids)
    want = jax.jit(model.apply)({"params": params}, ids, jnp.asarray(valid))
    cache = model.apply({"params": params}, 3, 14, method="new_cache")
    cache = cache.per_row() if per_row else cache
    run = jax.jit(_run, static_argnums=0)
    got = []
    for start, stop in ((0, 9), (9, 12), (12, 13), (13, 14)):
        piece = slice(start, stop)
        logits, cache = run(model, params, cache, ids[:, piece], valid[:, piece])
        got.append(logits)
    got = np.concatenate(got, axis=1)
    assert close(got[valid], np.array(want)[valid], 1e-5)
    # Control: the same with one slot of the cache changed.
    changed = cache.replace(k=cache.k.at[0, :, 8].add(1.0)).rewind(cache.end - 1)
    logits, _ = run(model, params, changed, ids[:, 13:], valid[:, 13:])
    assert relative_error(logits, want[:, 13:]) > 1e-3


def test_rejected_tokens_leave_no_trace():
    """Rows keep different numbers of a block's tokens, as speculative decoding does."""
    _, model, params = tiny_qwen2()
    ids = jnp.asarray(prompts(batch=3, length=16))
    cache = model.apply({"params": params}, 3, 16, method="new_cache")
    run = jax.jit(_run, static_argnums=0)
    _, cache = run(model, params, cache, ids[:, :5], np.ones((3, 5), bool))
    _, cache = run(model, params, cache.per_row(), ids[:, 9:13], np.ones((3, 4), bool))
    kept = np.array([4, 0, 2])
    cache = cache.rewind(5 + kept)
    logits, cache = run(model, params, cache, ids[:, 13:16], np.ones((3, 3), bool))
    assert cache.end.tolist() == (8 + kept).tolist()
    for row, k in enumerate(kept):
        whole = np.concatenate([ids[row, :5], ids[row, 9 : 9 + k], ids[row, 13:16]])
        want = jax.jit(model.apply)({"params": params}, jnp.asarray(whole[None]))
        assert close(logits[row], want[0, -3:], 1e-5)
