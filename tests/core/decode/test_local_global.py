"""Rings of local layers: what lies where, and a cached forward pass that equals the whole one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.decode.local_global import LocalGlobalCache, sequence_view
from tests.core.models.gemma3_twin import (
    TEXT,
    WINDOW,
    image_twin,
    pixels,
    prompt,
    text_ids,
    text_twin,
)
from tests.oracle import close, relative_error

DRAFT = 3  # so that a ring has 12 slots
TOLERANCE = 1e-5


def _strings(mask):
    return ["".join(str(int(x)) for x in row) for row in np.asarray(mask)]


def test_what_the_inputs_of_a_sequence_see():
    valid = jnp.ones((1, 5), bool).at[0, 0].set(False)
    positions = jnp.array([[0, 0, 1, 2, 3]])
    view = sequence_view(
        valid, positions, window=2, blocks=jnp.array([[-1, -1, 0, 0, -1]])
    )
    assert _strings(view.full.own[0, 1:]) == ["01000", "01110", "01110", "01111"]
    assert _strings(view.local.own[0, 1:]) == ["01000", "01110", "00110", "00011"]


def _cache(batch=1, slots=20, window=3, draft=1):
    return LocalGlobalCache.allocate(
        local_layers=1, full_layers=1, batch=batch, slots=slots, kv_heads=1, head_dim=2,
        window=window, draft=draft, dtype=jnp.float32,
    )  # fmt: skip


def test_a_ring_holds_the_window_the_draft_and_one_more():
    cache = _cache()
    assert (cache.ring, cache.slots) == (5, 20)
    assert cache.local_k.shape == (1, 1, 5, 1, 2)
    assert _cache(slots=4).ring == 4
    assert _cache(slots=4).grow(1).ring == 5
    assert _cache(slots=4).grow(9).ring == 5
    assert _cache(slots=4).grow(9).slots == 13


def test_where_inputs_are_written_and_what_they_see():
    cache = dataclasses.replace(_cache(), end=jnp.array([7]), fresh=False)
    _, positions, view = cache.claim(jnp.ones((1, 2), bool))
    assert positions.tolist() == [[7, 8]]
    assert view.end.tolist() == [9]
    assert view.local.slots.tolist() == [[2, 3]]
    assert view.full.slots.tolist() == [[7, 8]]
    assert view.local.own is None
    assert view.full.own is None
    # Ring after the write: positions 5 6 7 8 4.
    assert _strings(view.local.cached[0]) == ["11100", "01110"]
    assert _strings(view.full.cached[0]) == ["1" * 8 + "0" * 12, "1" * 9 + "0" * 11]
    # More inputs than may be written first: the ring is read as it was, 5 6 2 3 4.
    _, _, view = cache.claim(jnp.ones((1, 4), bool))
    assert _strings(view.local.cached[0]) == ["11000", "01000", "00000", "00000"]
    assert _strings(view.local.own[0]) == ["1000", "1100", "1110", "0111"]
    assert view.full.own is None


def test_only_real_tokens_that_fit_are_written_and_of_a_long_prompt_the_end():
    cache = _cache(batch=2, slots=7)
    new = np.ones((2, 9), bool)
    new[1, :3] = False
    _, positions, view = cache.claim(jnp.asarray(new))
    assert positions[1].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert view.full.slots.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 7], [7, 7, 7, 0, 1, 2, 3, 4, 5]]
    assert view.local.slots.tolist() == [[5, 5, 2, 3, 4, 0, 1, 5, 5], [5, 5, 5, 5, 1, 2, 3, 4, 0]]
    assert view.end.tolist() == [9, 6]


@functools.cache
def _run(twin_kind, name):
    """(model, params, jitted claim-and-run)."""
    twin = (text_twin if twin_kind == "text" else image_twin)(name)

    @functools.partial(jax.jit, static_argnames="model")
    def run(params, cache, embeds, valid, blocks, model):
        cache, positions, view = cache.claim(valid, blocks)
        variables = {"params": params}
        hidden, cache = model.apply(
            variables, embeds, positions, view, cache, method="hidden_states"
        )
        return model.apply(variables, hidden, method="logits"), cache

    return twin, lambda cache, embeds, valid, blocks=None: run(
        twin.params, cache, embeds, valid, blocks, twin.model
    )


def _apply(twin, method, *args):
    return twin.model.apply({"params": twin.params}, *args, method=method)


def _whole(twin, ids):
    return np.array(jax.jit(twin.model.apply)({"params": twin.params}, jnp.asarray(ids)))


def _embed(twin, ids):
    return _apply(twin, "embed", jnp.asarray(ids))


@pytest.mark.parametrize("name", TEXT)
def test_prefill_extend_step_and_rewind_equal_the_whole_forward_pass(name):
    """Rows of different lengths, a prompt longer than window and ring, drafts that are refused."""
    twin, run = _run("text", name)
    # Row 1 has 5 tokens fewer in front.
    ids = text_ids(2, 45)
    want = [_whole(twin, ids[:1])[0], _whole(twin, ids[1:, 5:])[0]]
    P = 20
    valid = np.ones((2, P), bool)
    valid[1, :5] = False
    cache = _apply(twin, "new_cache", 2, 48, DRAFT)
    assert (cache.ring, cache.slots) == (WINDOW + DRAFT + 1, 48)
    logits, cache = run(cache, _embed(twin, ids[:, :P]), jnp.asarray(valid))
    assert cache.end.tolist() == [20, 15]
    assert close(logits[0], want[0][:P], TOLERANCE)
    assert close(logits[1, 5:], want[1][: P - 5], TOLERANCE)
    # Rounds of DRAFT + 1 inputs, of which a random number stays; the others are wrong tokens.
    rng = np.random.default_rng(1)
    ones = jnp.ones((2, DRAFT + 1), bool)
    own = [ids[0], ids[1, 5:]]
    done = np.array([20, 15])
    for _ in range(7):
        keep = rng.integers(1, DRAFT + 2, 2)
        inputs = np.stack([own[i][done[i] : done[i] + DRAFT + 1] for i in range(2)])
        for i in range(2):
            inputs[i, keep[i] :] = rng.integers(3, 140, DRAFT + 1 - keep[i])
        logits, cache = run(cache, _embed(twin, inputs), ones)
        for i in range(2):
            got = logits[i, : keep[i]]
            assert close(got, want[i][done[i] : done[i] + keep[i]], TOLERANCE)
        done = done + keep
        cache = cache.rewind(jnp.asarray(done))
        assert cache.lengths().tolist() == done.tolist()
    # Single steps after that.
    assert done.max() < 40
    for _ in range(3):
        inputs = np.stack([own[i][done[i] : done[i] + 1] for i in range(2)])
        logits, cache = run(cache, _embed(twin, inputs), ones[:, :1])
        for i in range(2):
            assert close(logits[i, 0], want[i][done[i]], TOLERANCE)
        done = done + 1


def test_a_ring_without_room_for_the_draft_forgets():
    """The control: with no slots for the draft, going back loses what local layers should see."""
    twin, run = _run("text", "remainder")
    ids = text_ids(1, 45)
    want = _whole(twin, ids)[0]
    errors = []
    for draft in (DRAFT, 0):
        cache = _apply(twin, "new_cache", 1, 48, draft)
        _, cache = run(cache, _embed(twin, ids[:, :20]), jnp.ones((1, 20), bool))
        _, cache = run(cache, _embed(twin, ids[:, 21:25]), jnp.ones((1, 4), bool))
        cache = cache.rewind(20)
        logits, _ = run(cache, _embed(twin, ids[:, 20:24]), jnp.ones((1, 4), bool))
        errors.append(relative_error(logits[0], want[20:24]))
    assert errors[0] < TOLERANCE
    assert errors[1] > 1e-3


@pytest.mark.parametrize("slots", [10, 21])
def test_inputs_past_the_last_slot_do_no_harm(slots):
    """A draft may reach over the end; the tokens before it see what they should."""
    twin, run = _run("text", "remainder")
    ids = text_ids(1, 45)
    want = _whole(twin, ids)[0]
    cache = _apply(twin, "new_cache", 1, slots, DRAFT)
    _, cache = run(cache, _embed(twin, ids[:, : slots - 1]), jnp.ones((1, slots - 1), bool))
    for _ in range(2):
        window = _embed(twin, ids[:, slots - 1 : slots + DRAFT])
        logits, after = run(cache, window, jnp.ones((1, DRAFT + 1), bool))
        assert close(logits[0, 0], want[slots - 1], TOLERANCE)
        cache = after.rewind(slots - 1)


def test_a_long_prompt_in_parts_equals_the_whole_forward_pass():
    twin, run = _run("text", "remainder")
    ids = text_ids(2, 45)
    want = _whole(twin, ids)
    cache = _apply(twin, "new_cache", 2, 45)
    at = 0
    for length in (15, 15, 2, 13):
        part = slice(at, at + length)
        logits, cache = run(cache, _embed(twin, ids[:, part]), jnp.ones((2, length), bool))
        assert close(logits, want[:, part], TOLERANCE)
        at += length


def test_images_in_one_call_or_in_a_later_one_equal_the_whole_forward_pass():
    name = "remainder"
    twin, run = _run("image", name)
    ids, images = prompt(name, 2, 30), pixels(name, 2)
    variables = {"params": twin.params}
    want = jax.jit(twin.model.apply)(variables, jnp.asarray(ids), jnp.asarray(images))
    tokens = _apply(twin, "encode_image", jnp.asarray(images)).reshape(1, 8, -1)
    embeds = _apply(twin, "embed_prompt", jnp.asarray(ids), tokens)
    blocks = _apply(twin, "image_blocks", jnp.asarray(ids))
    seen = jnp.ones(ids.shape, bool)
    for first in (30, 10):  # the first image ends at 9, the second starts at 12
        cache = _apply(twin, "new_cache", 1, 40, DRAFT)
        parts = []
        for part in (slice(0, first), slice(first, 30)):
            if part.start < part.stop:
                logits, cache = run(cache, embeds[:, part], seen[:, part], blocks[:, part])
                parts.append(logits)
        assert close(jnp.concatenate(parts, axis=1), want, TOLERANCE)
    blind, _ = run(_apply(twin, "new_cache", 1, 40), embeds, seen)
    assert relative_error(blind, want) > 1e-2


def test_rows_are_repeated_reordered_and_the_cache_grows():
    twin, run = _run("text", "remainder")
    ids = text_ids(2, 25)
    want = _whole(twin, ids)
    valid = np.ones((2, 11), bool)
    cache = _apply(twin, "new_cache", 2, 11)  # the ring is not complete yet
    _, cache = run(cache.grow(0), _embed(twin, ids[:, :11]), jnp.asarray(valid))
    cache = cache.grow(14).repeat(2).take_rows(jnp.array([3, 0, 1, 2]), shared=11)
    assert cache.ring == WINDOW + 1
    assert cache.per_row() is cache
    order = np.array([1, 0, 0, 1])
    for at in range(11, 14):
        step = _embed(twin, ids[order, at : at + 1])
        logits, cache = run(cache, step, jnp.ones((4, 1), bool))
        assert close(logits[:, 0], want[order, at], TOLERANCE)
