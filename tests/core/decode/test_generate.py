"""Greedy and sampled generation: against transformers, and on a decoder made of a table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.decode import SamplingRule, generate
from core_jax.decode.adapters import CausalDecoder, EmbeddingPrefix, TokenPrefix
from tests.core.decode.tiny_qwen2 import PAD, left_padded, prompts, tiny_qwen2

N = 24


def oracle_greedy(oracle, *, eos=None, **inputs):
    torch = pytest.importorskip("torch")

    inputs = {k: torch.tensor(np.array(v)) for k, v in inputs.items()}
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    tokens = oracle.generate(
        **inputs, max_new_tokens=N, do_sample=False, eos_token_id=eos, pad_token_id=PAD
    )[:, start:].numpy()
    return np.pad(tokens, ((0, 0), (0, N - tokens.shape[1])), constant_values=PAD)


def test_greedy_from_padded_ids_equals_transformers():
    oracle, model, params = tiny_qwen2()
    ids, valid = left_padded()
    want = oracle_greedy(oracle, input_ids=ids.astype(np.int64), attention_mask=valid * 1)
    assert len(np.unique(want)) >= 10
    decoder = CausalDecoder(model)
    prefix = TokenPrefix(jnp.asarray(ids), jnp.asarray(valid))
    out = generate(decoder, params, prefix, max_new_tokens=N, pad_id=PAD)
    np.testing.assert_array_equal(out.tokens, want)
    assert not out.finished.any()
    assert (out.lengths == N).all()
    # The same prompts padded on the right.
    order = np.argsort(~valid, axis=1, kind="stable")
    right = [jnp.asarray(np.take_along_axis(x, order, axis=1)) for x in (ids, valid)]
    again = generate(decoder, params, TokenPrefix(*right), max_new_tokens=N, pad_id=PAD)
    np.testing.assert_array_equal(again.tokens, want)
    # Control: padding that is not masked is read as text.
    unmasked = generate(decoder, params, TokenPrefix(prefix.ids), max_new_tokens=N, pad_id=PAD)
    assert (np.array(unmasked.tokens) != want)[1:].any(axis=1).all()


def test_end_tokens_end_rows():
    oracle, model, params = tiny_qwen2()
    ids = prompts()
    free = oracle_greedy(oracle, input_ids=ids.astype(np.int64))
    # Tokens that end rows 0 and 1 in the middle, and may end the others anywhere.
    eos = [int(free[0, 7]), int(free[1, 12])]
    want = oracle_greedy(oracle, eos=eos, input_ids=ids.astype(np.int64))
    assert len(np.unique(want)) >= 10
    out = generate(
        CausalDecoder(model), params, TokenPrefix(jnp.asarray(ids)), max_new_tokens=N,
        eos_ids=eos, pad_id=PAD,
    )  # fmt: skip
    np.testing.assert_array_equal(out.tokens, want)
    ended = np.isin(want, eos)
    np.testing.assert_array_equal(out.finished, ended.any(axis=1))
    lengths = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, N)
    np.testing.assert_array_equal(out.lengths, lengths)
    assert len(set(lengths.tolist())) > 1
    # Scores are the sums of log probabilities of the whole pass.
    text = np.concatenate([ids[:1], want[:1, : lengths[0]]], axis=1)
    log_probs = jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, jnp.asarray(text)))
    score = np.take_along_axis(np.array(log_probs)[0, 8:-1], want[0, : lengths[0], None], 1).sum()
    assert abs(float(out.scores[0]) - score) < 1e-3


def test_greedy_from_embeddings_equals_transformers():
    oracle, model, params = tiny_qwen2()
    embeds = np.random.default_rng(1).normal(size=(3, 11, 32)).astype(np.float32)
    want = oracle_greedy(oracle, inputs_embeds=embeds, attention_mask=np.ones((3, 11), int))
    assert len(np.unique(want)) >= 10
    prefix = EmbeddingPrefix(jnp.asarray(embeds))
    out = generate(CausalDecoder(model), params, prefix, max_new_tokens=N, pad_id=PAD)
    np.testing.assert_array_equal(out.tokens, want)


def test_a_sampled_row_does_not_depend_on_its_neighbours():
    _, model, params = tiny_qwen2(std=0.1)
    rule = SamplingRule(temperature=1.0, top_k=20, top_p=0.95, repetition_penalty=1.1)

    def sample(ids, valid, seeds, seed=0):
        prefix = TokenPrefix(jnp.asarray(ids), jnp.asarray(valid))
        return np.array(generate(
            CausalDecoder(model), params, prefix, max_new_tokens=12, eos_ids=5, pad_id=PAD,
            rule=rule, key=jax.random.key(seed), row_seeds=jnp.asarray(seeds),
        ).tokens)  # fmt: skip

    ids, valid = left_padded()
    seeds = np.array([10, 11, 12, 10])
    together = sample(ids, valid, seeds)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(sample(ids[order], valid[order], seeds[order]), together[order])
    assert (sample(ids, valid, seeds, seed=1) != together).any(axis=1).all()
    assert (sample(ids, valid, seeds + 7) != together).any(axis=1).all()
    with pytest.raises(ValueError, match="needs a key"):
        generate(CausalDecoder(model), params, None, max_new_tokens=2, rule=rule)


@dataclasses.dataclass(frozen=True)
class Table:
    """A decoder that says params[last token], and counts its steps."""

    steps: list = dataclasses.field(default_factory=list, compare=False)

    def prefill(self, params, prefix, *, max_new_tokens):
        return params[prefix], jnp.zeros((), jnp.int32)

    def step(self, params, state, tokens):
        jax.debug.callback(lambda: self.steps.append(1))
        return params[tokens], state + 1

    def repeat(self, state, times):
        return state

    def reorder(self, state, rows):
        return state


def test_the_loop_stops_when_every_row_has_ended():
    count_up = jnp.roll(jnp.eye(6), 1, axis=1) * 9.0
    decoder = Table()
    out = generate(decoder, count_up, jnp.array([0, 2]), max_new_tokens=50, eos_ids=4, pad_id=5)
    jax.effects_barrier()
    assert out.tokens[:, :5].tolist() == [[1, 2, 3, 4, 5], [3, 4, 5, 5, 5]]
    assert out.lengths.tolist() == [4, 2]
    assert len(decoder.steps) == 3
    assert out.tokens.shape == (2, 50)


def test_samples_follow_the_rule():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    table = jnp.broadcast_to(logits, (4, 4))
    rule = SamplingRule(temperature=0.5)
    out = generate(
        Table(), table, jnp.zeros(2000, jnp.int32), max_new_tokens=5, rule=rule,
        key=jax.random.key(0),
    )  # fmt: skip
    want = np.array([1, 4, 9, 16]) / 30
    for column in np.array(out.tokens).T:  # every position, so keys differ over positions too
        got = np.bincount(column, minlength=4) / 2000
        assert np.abs(got - want).max() < 0.05
    columns = np.array(out.tokens).T
    assert abs(np.corrcoef(columns[0], columns[1])[0, 1]) < 0.1


def test_repetition_penalty_equals_transformers():
    torch = pytest.importorskip("torch")

    oracle, model, params = tiny_qwen2()
    embeds = np.random.default_rng(1).normal(size=(3, 5, 32)).astype(np.float32)
    want = oracle.generate(
        inputs_embeds=torch.tensor(embeds), attention_mask=torch.ones(3, 5), max_new_tokens=N,
        do_sample=False, repetition_penalty=1.5, eos_token_id=None, pad_token_id=PAD,
    ).numpy()  # fmt: skip
    prefix = EmbeddingPrefix(jnp.asarray(embeds))
    rule = SamplingRule(repetition_penalty=1.5)
    out = generate(CausalDecoder(model), params, prefix, max_new_tokens=N, rule=rule, pad_id=PAD)
    np.testing.assert_array_equal(out.tokens, want)


def test_bfloat16_generates():
    _, model, params = tiny_qwen2()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    prefix = TokenPrefix(jnp.asarray(prompts()))
    out = generate(CausalDecoder(model), half, prefix, max_new_tokens=6, pad_id=PAD)
    full = generate(CausalDecoder(model), params, prefix, max_new_tokens=6, pad_id=PAD)
    assert out.scores.dtype == jnp.float32
    assert (np.array(out.tokens[:, 0]) == np.array(full.tokens[:, 0])).mean() >= 0.5
