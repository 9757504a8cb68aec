"""Florence-2's BART: causality, padding, positions, the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.models.florence2_twin import make_twin, random_model
from tests.oracle import close, relative_error


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _call(method, *args):
    model, params = random_model()
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method))(
        params, *args
    )


def test_encoder_padding_equals_transformers_and_hides_the_pads():
    torch = pytest.importorskip("torch")

    twin = make_twin("tall")
    inputs = twin.torch_inputs()
    P = inputs["input_ids"].shape[1] - 6
    valid = np.ones((2, P + 6), bool)
    valid[0, -2:] = False
    valid[1, :1] = False
    inputs["attention_mask"] = torch.tensor(valid.astype(np.int64))
    with torch.no_grad():
        out = twin.oracle(**inputs)
    model, params = twin.loaded

    @jax.jit
    def forward(params, prompt):
        variables = {"params": params}
        image = model.apply(variables, twin.pixels, method="encode_image")
        prompt = model.apply(variables, prompt, method="embed_tokens")
        x = jnp.concatenate([image, prompt], axis=1)
        states = model.apply(variables, x, jnp.asarray(valid), method="encode")
        target = model.apply(variables, twin.decoder_ids, method="embed_tokens")
        hidden = model.apply(variables, target, states, jnp.asarray(valid), method="decode")
        return states, model.apply(variables, hidden, method="logits")

    states, logits = forward(params, twin.prompt)
    want = out.encoder_last_hidden_state.numpy()
    assert close(np.asarray(states)[valid], want[valid], 1e-5)
    assert close(logits, out.logits.numpy(), 1e-5)
    # A pad's token does not matter, a valid one's does.
    changed = forward(params, twin.prompt.at[0, -1].set(7))[1]
    np.testing.assert_array_equal(changed, logits)
    changed = forward(params, twin.prompt.at[0, 0].set(7))[1]
    assert relative_error(changed, logits) > 1e-3


def test_queries_see_only_earlier_queries():
    """VLV's queries are decoded with the causal mask, though all are given at once."""
    model, params = random_model()
    queries, states = _normal(0, 1, 7, 32), _normal(1, 1, 5, 32)

    def summed(queries):
        hidden = model.apply({"params": params}, queries, states, method="decode")
        return jnp.sum(hidden**2, axis=(0, 2))

    gradient = jax.jit(jax.jacrev(summed))(queries)  # [7 outputs, 1, 7 inputs, 32]
    reach = np.abs(np.asarray(gradient)).sum(axis=(1, 3))
    assert (np.triu(reach, 1) == 0).all()
    assert (reach[np.tril_indices(7)] > 0).all()


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1, 1), (4, 1, 2), (7,)])
def test_cached_decoding_equals_the_full_forward(chunks):
    model, params = random_model()
    embeds, states = _normal(0, 2, 7, 32), _normal(1, 2, 6, 32)
    valid = jnp.asarray([[True] * 6, [True] * 4 + [False] * 2])
    want = _call("decode", embeds, states, valid)
    prefill = jax.jit(
        lambda x, cache: model.apply({"params": params}, x, states, valid, cache, method="decode")
    )
    step = jax.jit(
        lambda x, cache: model.apply({"params": params}, x, cache=cache, method="decode")
    )
    cache = model.init_cache(2, 9, 6)
    start, parts = 0, []
    for number, size in enumerate(chunks):
        x = embeds[:, start : start + size]
        hidden, cache = step(x, cache) if number else prefill(x, cache)
        parts.append(hidden)
        start += size
    assert int(cache.end) == 7
    assert close(jnp.concatenate(parts, axis=1), want, 1e-5)
    # Control: positions that start again at 0.
    again, _ = step(embeds[:, -1:], cache.replace(end=jnp.int32(0)))
    assert relative_error(again, want[:, -1:]) > 1e-3


def test_a_cache_survives_a_while_loop_and_beams():
    model, params = random_model()
    embeds, states = _normal(0, 2, 6, 32), _normal(1, 2, 5, 32)

    @jax.jit
    def run(embeds):
        cache = model.init_cache(2, 6, 5)
        variables = {"params": params}
        first, cache = model.apply(variables, embeds[:, :2], states, cache=cache, method="decode")

        def body(carry):
            cache, _ = carry
            x = jax.lax.dynamic_slice_in_dim(embeds, cache.end, 1, axis=1)
            hidden, cache = model.apply(variables, x, cache=cache, method="decode")
            return cache, hidden

        carry = (cache, first[:, -1:])
        cache, last = jax.lax.while_loop(lambda carry: carry[0].end < 5, body, carry)
        x = embeds[:, 5:]
        straight, _ = model.apply(variables, x, cache=cache, method="decode")
        # Beam 1 of input 0 is spoilt, then the two change places: only row 0 may be wrong.
        beams = cache.repeat(2)
        marked = beams.replace(k=beams.k.at[:, 1].set(0.0))
        swapped = marked.take_rows(jnp.asarray([1, 0, 3, 3]))
        turned, _ = model.apply(variables, jnp.repeat(x, 2, 0), cache=swapped, method="decode")
        return last, straight, turned

    last, straight, turned = run(embeds)
    want = _call("decode", embeds, states)
    assert close(last, want[:, 4:5], 1e-5)
    assert close(straight, want[:, 5:], 1e-5)
    assert close(turned[1:], want[jnp.asarray([0, 1, 1]), 5:], 1e-5)
    assert relative_error(turned[:1], want[:1, 5:]) > 1e-3


def test_errors_say_what_does_not_fit():
    model, params = random_model()

    def decode(x, *args, **kwargs):
        return model.apply({"params": params}, x, *args, method="decode", **kwargs)

    x, states = jnp.zeros((1, 4, 32)), jnp.zeros((1, 5, 32))
    cache = model.init_cache(1, 3, 5)
    with pytest.raises(ValueError, match="needs encoder_states"):
        decode(x)
    with pytest.raises(ValueError, match="4 tokens do not fit into a cache of 3"):
        decode(x, states, cache=cache)
    with pytest.raises(ValueError, match="5 encoder states, but the cache was made for 4"):
        decode(x, states, cache=model.init_cache(1, 3, 4))
    with pytest.raises(ValueError, match="belongs to encoder_states"):
        decode(x, encoder_valid=jnp.ones((1, 5), bool), cache=cache)
    with pytest.raises(ValueError, match="129 slots, but the decoder has 128"):
        model.init_cache(1, 129, 5)
    with pytest.raises(ValueError, match="129 positions, but the model has 128"):
        model.apply({"params": params}, jnp.zeros((1, 129, 32)), method="encode")
