"""Decoding prompts with images: transformers' tokens, cached passes, windows and roll-back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.decode import beam_search, generate
from core_jax.decode.qwen2_5_vl import ImagePrompt, ImageTextDecoder
from tests.core.models.qwen2_5_vl_twin import (
    PAD,
    apply,
    batch,
    our_inputs,
    prompt,
    random_images,
    tiny,
    torch_inputs,
)
from tests.oracle import close, relative_error

GRIDS = [(1, 6, 10), (1, 12, 4), (1, 4, 8)]
NEW = 24


def _rows():
    return batch([
        prompt(5, GRIDS[0], 3, GRIDS[1], 12, seed=1),
        prompt(9, GRIDS[2], 4, seed=2),
        prompt(30, seed=3),
    ])


@functools.cache
def _case(name):
    """(oracle, model, params, prompt, ids, valid, patches)."""
    # A tied model repeats itself unless its layers are stronger than its table.
    kwargs = {} if name == "untied" else {"std": 0.6, "table": 0.2}
    oracle, model, params = tiny(name, **kwargs)
    ids, valid = _rows()
    patches = random_images(model.config, GRIDS)
    inputs, _, places = our_inputs(
        model.config, ids, valid, patches, GRIDS, rows=1, windows=20
    )
    tokens = apply(model, params, *inputs[3:6], method="image_tokens")
    prefix = ImagePrompt.at(ids, places, valid=valid, image_tokens=tokens)
    return oracle, model, params, prefix, ids, valid, patches


@functools.partial(jax.jit, static_argnames=("decoder", "method", "max_new_tokens"))
def _run(decoder, method, *args, max_new_tokens=None):
    more = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    return getattr(decoder, method)(*args, **more)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_greedy_equals_transformers_token_for_token(name):
    torch = pytest.importorskip("torch")

    oracle, model, params, prefix, ids, valid, patches = _case(name)
    oracle.generation_config.eos_token_id = None
    with torch.no_grad():
        want = oracle.generate(
            **torch_inputs(ids, valid, patches, GRIDS), max_new_tokens=NEW, do_sample=False,
            pad_token_id=PAD, eos_token_id=None,
        )[:, ids.shape[1]:].numpy()  # fmt: skip
    got = generate(ImageTextDecoder(model), params, prefix, max_new_tokens=NEW)
    np.testing.assert_array_equal(got.tokens, want)
    assert len(np.unique(want)) >= 12
    # Control: other images, other words.
    blank = prefix.replace(image_tokens=prefix.image_tokens[:, ::-1])
    other = generate(ImageTextDecoder(model), params, blank, max_new_tokens=NEW).tokens
    assert not np.array_equal(other[:2], want[:2])
    np.testing.assert_array_equal(other[2], want[2])


def _full_logits(model, params, ids, valid, patches, answer):
    """Logits after the prompt and after every token of the answer, without a cache."""
    ids = np.concatenate([ids, answer], axis=1)
    valid = np.concatenate([valid, np.ones(answer.shape, bool)], axis=1)
    inputs, _, _ = our_inputs(model.config, ids, valid, patches, GRIDS, rows=1, windows=20)
    return np.asarray(apply(model, params, *inputs))[:, -answer.shape[1] - 1 :]


def test_cached_steps_and_windows_equal_the_whole_pass():
    _, model, params, prefix, ids, valid, patches = _case("untied")
    decoder = ImageTextDecoder(model)
    answer = np.random.default_rng(3).integers(3, 149, (3, 6)).astype(np.int32)
    want = _full_logits(model, params, ids, valid, patches, answer)
    logits, state = _run(decoder, "prefill", params, prefix, max_new_tokens=12)
    assert close(logits, want[:, 0], 1e-5)
    logits, after = _run(decoder, "step", params, state, answer[:, 0])
    assert close(logits, want[:, 1], 1e-5)
    window, _ = _run(decoder, "extend", params, after, answer[:, 1:])
    assert close(window, want[:, 2:], 1e-5)
    # Control: the offset of the images forgotten.
    wrong = after.replace(offsets=jnp.zeros_like(after.offsets))
    window, _ = _run(decoder, "extend", params, wrong, answer[:, 1:])
    assert relative_error(window[:2], want[:2, 2:]) > 1e-3


def test_extend_and_rewind_equal_plain_steps():
    _, model, params, prefix, ids, valid, patches = _case("untied")
    decoder = ImageTextDecoder(model)
    rng = np.random.default_rng(4)
    answer = rng.integers(3, 149, (3, 14)).astype(np.int32)
    want = _full_logits(model, params, ids, valid, patches, answer)
    _, state = _run(decoder, "prefill", params, prefix, max_new_tokens=24)
    state = state.replace(cache=state.cache.per_row())
    kept = np.zeros(3, int)
    T = 4  # a token and a draft of three
    for _ in range(4):
        accepted = rng.integers(1, T + 1, 3)
        accepted[0] = T if kept[0] == 0 else accepted[0]
        accepted = np.minimum(accepted, 14 - kept)
        window = rng.integers(3, 149, (3, T)).astype(np.int32)  # what is not kept is nonsense
        for row in range(3):
            right = answer[row, kept[row] : kept[row] + accepted[row]]
            window[row, : accepted[row]] = right
        logits, state = _run(decoder, "extend", params, state, window)
        for row in range(3):
            n, k = accepted[row], kept[row]
            assert close(logits[row, :n], want[row, k + 1 : k + 1 + n], 1e-5)
        kept = kept + accepted
        state = decoder.rewind(state, ids.shape[1] + kept)
        np.testing.assert_array_equal(state.cache.lengths(), valid.sum(1) + kept)
    assert len(set(kept.tolist())) > 1
    # Control: without the rewind the nonsense stays.
    _, state = _run(decoder, "prefill", params, prefix, max_new_tokens=24)
    state = state.replace(cache=state.cache.per_row())
    nonsense = answer[:, ::-1][:, :T]
    _, state = _run(decoder, "extend", params, state, nonsense)
    logits, _ = _run(decoder, "extend", params, state, answer[:, :T])
    assert relative_error(logits, want[:, 1 : T + 1]) > 1e-3


def test_a_row_alone_gives_what_it_gives_beside_others():
    _, model, params, prefix, *_ = _case("untied")
    decoder = ImageTextDecoder(model)
    together = generate(decoder, params, prefix, max_new_tokens=8).tokens
    _, valid = _rows()
    alone = ImagePrompt(
        ids=prefix.ids[1:2][:, valid[1]],
        positions=prefix.positions[:, 1:2][:, :, valid[1]],
        next_positions=prefix.next_positions[1:2],
        image_slots=prefix.image_slots[1:2][:, valid[1]],
        image_tokens=prefix.image_tokens,
    )
    again = generate(decoder, params, alone, max_new_tokens=8).tokens
    np.testing.assert_array_equal(again[0], together[1])


def test_one_beam_is_greedy():
    _, model, params, prefix, *_ = _case("untied")
    decoder = ImageTextDecoder(model)
    greedy = generate(decoder, params, prefix, max_new_tokens=8)
    beam = beam_search(decoder, params, prefix, max_new_tokens=8, num_beams=1)
    np.testing.assert_array_equal(beam.tokens, greedy.tokens)
