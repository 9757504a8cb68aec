"""Keys depend on row seed, position and purpose, and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.decode import SamplingRule, generate
from massv_jax.speculative import Purpose, draw_tokens, keys_at, purpose_key, row_keys
from massv_jax.speculative.keys import uniforms_at


@jax.jit
def _all_keys(key, seeds, positions):
    """Raw key data [3, B, T, 2]."""
    streams = row_keys(key, seeds)
    return jnp.stack([jax.random.key_data(keys_at(s, positions)) for s in streams])


def _grid(batch, length):
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))


def test_no_two_rows_positions_or_purposes_share_a_key():
    data = np.array(_all_keys(jax.random.key(0), jnp.arange(20), _grid(20, 16)))
    assert len(np.unique(data.reshape(-1, 2), axis=0)) == 3 * 20 * 16
    other = np.array(_all_keys(jax.random.key(1), jnp.arange(20), _grid(20, 16)))
    assert not (data == other).all(axis=-1).any()


def test_a_key_does_not_depend_on_the_place_in_the_batch_or_on_neighbours():
    seeds = jnp.array([7, 3, 2**31 - 1, 0])
    positions = jnp.array([[5, 6], [0, 1], [9, 10], [2, 3]], jnp.int32)
    data = np.array(_all_keys(jax.random.key(0), seeds, positions))
    order = np.array([2, 0, 3, 1])
    moved = np.array(_all_keys(jax.random.key(0), seeds[order], positions[order]))
    np.testing.assert_array_equal(moved, data[:, order])
    among_others = np.array(
        _all_keys(jax.random.key(0), seeds.at[1:].set(99), positions.at[1:].set(40))
    )
    np.testing.assert_array_equal(among_others[:, 0], data[:, 0])
    assert (among_others[:, 1:] != data[:, 1:]).any(axis=-1).all()


def test_a_position_has_the_same_key_alone_and_in_a_window():
    @jax.jit
    def both(key):
        stream = row_keys(key, jnp.arange(3)).draft
        alone = keys_at(stream, jnp.full((3,), 2, jnp.int32))
        return jax.random.key_data(keys_at(stream, _grid(3, 4))), jax.random.key_data(alone)

    window, alone = both(jax.random.key(0))
    np.testing.assert_array_equal(window[:, 2], alone)


def test_numbers_of_neighbouring_rows_positions_and_purposes_are_uncorrelated():
    B, T = 64, 64
    streams = row_keys(jax.random.key(5), jnp.arange(B))
    draw = jax.jit(uniforms_at)
    numbers = np.stack([np.array(draw(s, _grid(B, T)), np.float64) for s in streams])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 * np.sqrt(1 / 12 / numbers.size)

    def correlation(a, b):
        return abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) * np.sqrt(a.size)

    draft, accept, resample = numbers
    assert correlation(draft, accept) < 4
    assert correlation(accept, resample) < 4
    assert correlation(draft, resample) < 4
    assert correlation(accept[1:], accept[:-1]) < 4
    assert correlation(accept[:, 1:], accept[:, :-1]) < 4
    assert correlation(accept[1:, :-1], accept[:-1, 1:]) < 4
    # The test has teeth.
    assert correlation(accept, accept + 0.5 * draft) > 20


class _Table:
    """A decoder whose logits depend on the last token only."""

    table = jnp.asarray(np.random.default_rng(0).normal(size=(11, 11)), jnp.float32)

    def prefill(self, params, prefix, *, max_new_tokens):
        return self.table[prefix], None

    def step(self, params, state, tokens):
        return self.table[tokens], state


def test_plain_sampling_is_the_resample_key_at_every_position():
    B, N = 6, 9
    key, seeds = jax.random.key(3), jnp.array([4, 4, 0, 17, 2, 9])
    rule = SamplingRule(temperature=1.0)
    prompts = jnp.arange(B)

    def plain(purpose):
        options = dict(max_new_tokens=N, rule=rule, row_seeds=seeds)
        return generate(_DECODER, {}, prompts, key=purpose_key(key, purpose), **options).tokens

    @jax.jit
    def ours(key):
        stream = row_keys(key, seeds).resample

        def step(last, i):
            keys = keys_at(stream, jnp.full((B,), i, jnp.int32))
            last = draw_tokens(_Table.table[last], keys)
            return last, last

        return jax.lax.scan(step, prompts, jnp.arange(N, dtype=jnp.int32))[1].T

    np.testing.assert_array_equal(ours(key), plain(Purpose.RESAMPLE))
    assert (ours(key) != plain(Purpose.DRAFT)).mean() > 0.5


_DECODER = _Table()


def test_noise_of_a_wider_vocabulary_is_that_of_padded_logits():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(32, 9)), jnp.float32)
    padded = jnp.pad(logits, ((0, 0), (0, 4)), constant_values=-jnp.inf)

    def draw(x, vocab=None):
        return draw_tokens(x, jax.random.split(jax.random.key(0), 32), vocab=vocab)

    draw = jax.jit(draw, static_argnames="vocab")
    np.testing.assert_array_equal(draw(logits, vocab=13), draw(padded))
    with pytest.raises(ValueError, match="noise of 8 numbers is too short for 9 logits"):
        draw(logits, vocab=8)
