"""Sampling rules against transformers' warpers, and samples against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.decode import SamplingRule
from core_jax.decode.sampling import choose_token, penalize_repetition, warp_logits

RULES = [
    dict(temperature=0.7),
    dict(temperature=1.3, top_k=5),
    dict(temperature=1.0, top_p=0.8),
    dict(temperature=0.6, top_k=12, top_p=0.7),
    dict(temperature=2.0, top_k=100, top_p=0.05),
    dict(temperature=1.0, top_k=1),
]


def _logits(batch=16, vocab=40):
    logits = np.random.default_rng(0).normal(0, 2, (batch, vocab)).astype(np.float32)
    logits[0] = np.round(logits[0])  # ties
    return logits


@pytest.mark.parametrize("options", RULES)
def test_warped_logits_equal_transformers(options):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    want = torch.tensor(_logits())
    want = transformers.TemperatureLogitsWarper(options["temperature"])(None, want)
    if "top_k" in options:
        want = transformers.TopKLogitsWarper(options["top_k"])(None, want)
    if "top_p" in options:
        want = transformers.TopPLogitsWarper(options["top_p"])(None, want)
    got = np.array(warp_logits(jnp.asarray(_logits()), SamplingRule(**options)))
    rows = slice(1, None) if "top_p" in options else slice(None)  # the order of ties is free
    want = want.numpy()
    assert np.array_equal(np.isinf(got[rows]), np.isinf(want[rows]))
    kept = np.isfinite(want[rows])
    np.testing.assert_allclose(got[rows][kept], want[rows][kept], rtol=1e-6)
    other = SamplingRule(**options | {"temperature": options["temperature"] * 1.01})
    assert not np.allclose(np.array(warp_logits(jnp.asarray(_logits()), other))[rows][kept],
                           want[rows][kept], rtol=1e-3)  # fmt: skip


def test_repetition_penalty_equals_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids = np.random.default_rng(1).integers(0, 40, (16, 7))
    seen = np.zeros((16, 40), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    want = processor(torch.tensor(ids), torch.tensor(_logits())).numpy()
    got = penalize_repetition(jnp.asarray(_logits()), jnp.asarray(seen), 1.7)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("options", [RULES[0], RULES[3]])
def test_samples_follow_the_warped_distribution(options):
    stats = pytest.importorskip("scipy.stats")
    rule, n = SamplingRule(**options), 20_000
    logits = jnp.asarray(_logits(batch=2)[1:])
    draw = jax.jit(choose_token, static_argnums=1)
    rows = jnp.repeat(logits, n, axis=0)
    tokens = draw(rows, rule, jax.random.split(jax.random.key(3), n))
    probs = np.array(jax.nn.softmax(warp_logits(logits, rule), axis=-1), np.float64)[0]
    counts = np.bincount(np.array(tokens), minlength=probs.size)
    assert not counts[probs == 0].any()
    likely = probs * n > 5
    observed = [*counts[likely], counts[~likely].sum()]
    expected = [*probs[likely] * n, max(probs[~likely].sum() * n, 1e-9)]
    if expected[-1] < 1e-6:
        observed, expected = observed[:-1], expected[:-1]
    expected = np.array(expected) * sum(observed) / sum(expected)
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    # The test has teeth: another temperature is told apart.
    other = SamplingRule(**options | {"temperature": options["temperature"] * 1.15})
    tokens = draw(rows, other, jax.random.split(jax.random.key(4), n))
    wrong = np.bincount(np.array(tokens), minlength=probs.size)
    wrong = [*wrong[likely], wrong[~likely].sum()][: len(observed)]
    assert stats.chisquare(wrong, expected * sum(wrong) / sum(expected)).pvalue < 1e-6


def test_greedy_is_the_argmax_and_bad_rules_are_refused():
    logits = jnp.asarray(_logits())
    assert np.array_equal(choose_token(logits, SamplingRule()), np.argmax(_logits(), axis=-1))
    for bad in (dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5),
                dict(repetition_penalty=0.0), dict(temperature=np.nan), dict(temperature=np.inf),
                dict(top_p=np.nan), dict(repetition_penalty=np.nan)):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            SamplingRule(**bad)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-60])
@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_tiny_temperatures_take_the_likeliest_and_share_ties(temperature, limits):
    logits = np.tile(np.float32([25.0, 90.0, -40.0, 3.0]), (2, 1))
    logits[1, 2] = 90.0
    rule = SamplingRule(temperature=temperature, **limits)
    probs = np.array(jax.nn.softmax(warp_logits(jnp.asarray(logits), rule), axis=-1))
    np.testing.assert_allclose(probs, [[0, 1, 0, 0], [0, 0.5, 0.5, 0]], atol=1e-6)
    keys = jax.random.split(jax.random.key(0), 2)
    assert int(choose_token(jnp.asarray(logits), rule, keys)[0]) == 1
