"""Generation with Gemma 3, token for token that of transformers; drafts and roll-back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.decode import beam_search, generate
from core_jax.decode.adapters import CausalDecoder, TokenPrefix
from core_jax.decode.gemma3 import Gemma3Decoder, Gemma3Prompt
from tests.core.models.gemma3_twin import (
    PAD,
    TEXT,
    image_twin,
    oracle_inputs,
    pixels,
    prompt,
    text_ids,
    text_twin,
)

N = 24
NAMES = list(TEXT)


def _oracle_greedy(twin, new=N, **inputs):
    """transformers' new tokens; the first end token is none, so that all are generated."""
    start = inputs["input_ids"].shape[1]
    tokens = twin.oracle.generate(
        **inputs, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=PAD
    )
    return tokens[:, start:].numpy()


def _padded(rows):
    """Left-padded ids and which are valid."""
    length = max(row.shape[1] for row in rows)
    ids, valid = np.full((len(rows), length), PAD, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, length - row.shape[1] :], valid[i, length - row.shape[1] :] = row[0], True
    return ids, valid


def _image_batch(name):
    """Two rows of different lengths with an image each: ids, valid, images."""
    ids, valid = _padded([prompt(name, 1, 27), prompt(name, 1, 18, seed=1)])
    return ids, valid, pixels(name, 2)


def _image_prompt(twin, ids, valid, images):
    tokens = twin.model.apply({"params": twin.params}, jnp.asarray(images), method="encode_image")
    tokens = tokens.reshape(len(ids), -1, tokens.shape[-1])
    return Gemma3Prompt(jnp.asarray(ids), jnp.asarray(valid), tokens)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_from_padded_ids_equals_transformers(name):
    torch = pytest.importorskip("torch")
    twin = text_twin(name)
    ids, valid = _padded([text_ids(1, 22), text_ids(1, 5, seed=1), text_ids(1, 13, seed=2)])
    want = _oracle_greedy(
        twin, input_ids=torch.tensor(ids.astype(np.int64)), attention_mask=torch.tensor(valid * 1)
    )
    prefix = Gemma3Prompt(jnp.asarray(ids), jnp.asarray(valid))
    got = generate(Gemma3Decoder(twin.model), twin.params, prefix, max_new_tokens=N)
    np.testing.assert_array_equal(got.tokens, want)
    assert len(set(np.asarray(got.tokens).ravel().tolist())) > 12  # not one word again and again


def test_the_decoder_of_other_language_models_serves_too():
    twin = text_twin("remainder")
    ids, valid = _padded([text_ids(1, 11), text_ids(1, 5, seed=1)])
    ids, valid = jnp.asarray(ids), jnp.asarray(valid)
    want = generate(
        Gemma3Decoder(twin.model), twin.params, Gemma3Prompt(ids, valid), max_new_tokens=N
    )
    got = generate(
        CausalDecoder(twin.model), twin.params, TokenPrefix(ids, valid), max_new_tokens=N
    )
    np.testing.assert_array_equal(got.tokens, want.tokens)
    one = beam_search(
        CausalDecoder(twin.model), twin.params, TokenPrefix(ids, valid), num_beams=1,
        max_new_tokens=N, eos_ids=(), length_penalty=0.0,
    )  # fmt: skip
    np.testing.assert_array_equal(one.tokens, want.tokens)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_with_images_equals_transformers(name):
    twin = image_twin(name)
    ids, valid, images = _image_batch(name)
    want = _oracle_greedy(twin, **oracle_inputs(name, ids, images, valid))
    prefix = _image_prompt(twin, ids, valid, images)
    decoder = Gemma3Decoder(twin.model)
    got = generate(decoder, twin.params, prefix, max_new_tokens=N)
    np.testing.assert_array_equal(got.tokens, want)
    other = _image_prompt(twin, ids, valid, images[::-1])
    other = generate(decoder, twin.params, other, max_new_tokens=N)
    assert (np.asarray(other.tokens) != want).mean() > 0.5


def test_drafts_that_are_refused_leave_no_trace():
    """Greedy decoding by windows: right and wrong drafts, rows that advance on their own."""
    name, gamma = "remainder", 4
    twin = image_twin(name)
    ids, valid, images = _image_batch(name)
    want = _oracle_greedy(twin, **oracle_inputs(name, ids, images, valid))
    decoder = Gemma3Decoder(twin.model, draft=gamma)
    prefix = _image_prompt(twin, ids, valid, images)
    logits, state = jax.jit(functools.partial(decoder.prefill, max_new_tokens=N + gamma + 1))(
        twin.params, prefix
    )
    extend = jax.jit(decoder.extend)
    out = [[int(t)] for t in np.argmax(logits, -1)]
    rng = np.random.default_rng(0)
    accepted = []
    while min(map(len, out)) < N:
        window = np.zeros((2, gamma + 1), np.int32)
        for row in range(2):
            true = [*want[row][len(out[row]) :], *[3] * gamma][:gamma]
            right = rng.integers(0, gamma + 1)
            wrong = rng.integers(3, 140, gamma)
            window[row] = [out[row][-1], *true[:right], *wrong[right:]]
        start = state.cache.end
        logits, state = extend(twin.params, state, jnp.asarray(window))
        says = np.argmax(logits, -1)
        keep = []
        for row in range(2):
            n = 0
            while n < gamma and says[row, n] == window[row, n + 1]:
                n += 1
            out[row] += says[row, : n + 1].tolist()
            keep.append(n + 1)
        accepted += keep
        state = decoder.rewind(state, start + jnp.asarray(keep))
    for row in range(2):
        assert out[row][:N] == want[row].tolist()
    assert len(set(accepted)) > 2


def test_a_row_does_not_depend_on_its_neighbours():
    name = "whole"
    twin = image_twin(name)
    ids, valid, images = _image_batch(name)
    decoder = Gemma3Decoder(twin.model)
    both = generate(
        decoder, twin.params, _image_prompt(twin, ids, valid, images), max_new_tokens=8
    )
    alone = _image_prompt(twin, ids[1:, valid[1]], valid[1:, valid[1]], images[1:])
    alone = generate(decoder, twin.params, alone, max_new_tokens=8)
    np.testing.assert_array_equal(alone.tokens[0], both.tokens[1])
