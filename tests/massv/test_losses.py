"""Losses on the target's distribution against plain sums over the vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from massv_jax.losses import LossConfig, combine, match_vocabulary, token_losses

B, T, D, V, W, E = 2, 7, 5, 11, 13, 4  # the target's table is longer than the drafter's


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    labels = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    mask = jnp.asarray(rng.random((B, T)) < 0.6)
    return draw(B, T, D), draw(V, D), labels, draw(B, T, E), draw(W, E), mask


@functools.partial(jax.jit, static_argnames="config")
def losses(hidden, table, labels, teacher, mask, config):
    terms = token_losses(hidden, table, labels, config, teacher)
    return terms, *combine(terms, mask, config)


def by_hand(arrays):
    hidden, table, labels, states, head, mask = (np.asarray(x, np.float64) for x in arrays)
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)  # noqa: E731
    q = softmax(hidden @ table.T)
    p = softmax(states @ head.T)[..., :V]  # not renormalised
    return p, q, labels.astype(int), mask.astype(bool)


def test_terms_equal_plain_sums(arrays):
    hidden, table, labels, states, head, mask = arrays
    config = LossConfig(ce=0.5, kl=1.0, tv=2.0, log_acceptance=0.3, teacher="target",
                        logits_chunk=3)  # fmt: skip
    terms, loss, metrics = losses(hidden, table, labels, (states, head), mask, config)
    p, q, wanted, keep = by_hand(arrays)
    ce = -np.log(np.take_along_axis(q, wanted[..., None], -1)[..., 0])
    kl = (p * np.log(p / q)).sum(-1)
    overlap = np.minimum(p, q).sum(-1)
    for name, value in (("ce", ce), ("kl", kl), ("overlap", overlap)):
        np.testing.assert_allclose(terms[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    total = 0.5 * ce + kl + 2 * (1 - overlap) - 0.3 * np.log(overlap)
    np.testing.assert_allclose(loss, total[keep].mean(), rtol=1e-5)
    assert metrics["weight"] == keep.sum()
    np.testing.assert_allclose(metrics["acceptance"], overlap[keep].mean(), rtol=1e-5)
    # The control: renormalising over the shared rows is another number.
    other = (p / p.sum(-1, keepdims=True) * np.log(p / p.sum(-1, keepdims=True) / q)).sum(-1)
    assert np.abs(other - kl).max() > 1e-2


def test_top_k_and_the_rest_bound_the_whole_and_meet_it(arrays):
    hidden, table, labels, states, head, mask = arrays
    whole = losses(hidden, table, labels, (states, head[:V]), mask,
                   LossConfig(kl=1.0, teacher="target"))[2]  # fmt: skip
    few = losses(hidden, table, labels, (states, head[:V]), mask,
                 LossConfig(kl=1.0, teacher="target", top_k=4))[2]  # fmt: skip
    most = losses(hidden, table, labels, (states, head[:V]), mask,
                  LossConfig(kl=1.0, teacher="target", top_k=V - 1))[2]  # fmt: skip
    assert few["kl"] < whole["kl"] - 1e-3
    np.testing.assert_allclose(most["kl"], whole["kl"], rtol=1e-4)
    assert few["acceptance"] > whole["acceptance"]


def test_stored_probabilities_give_what_the_target_gives(arrays):
    hidden, table, labels, states, head, mask = arrays
    log_p = jax.nn.log_softmax(states @ head[:V].T)
    picked, ids = jax.lax.top_k(log_p, 4)
    stored = losses(hidden, table, labels, (ids, picked), mask,
                    LossConfig(ce=0, tv=1.0, teacher="stored", top_k=4))  # fmt: skip
    live = losses(hidden, table, labels, (states, head[:V]), mask,
                  LossConfig(ce=0, tv=1.0, teacher="target", top_k=4))  # fmt: skip
    np.testing.assert_allclose(stored[1], live[1], rtol=1e-5)


def test_gradients_reach_the_drafter_and_not_the_target(arrays):
    hidden, table, labels, states, head, mask = arrays
    config = LossConfig(ce=0.0, log_acceptance=1.0, kl=0.1, teacher="target", logits_chunk=4)

    def of(hidden, states):
        return losses(hidden, table, labels, (states, head), mask, config)[1]

    ours, theirs = jax.jit(jax.grad(of, argnums=(0, 1)))(hidden, states)
    assert np.isfinite(ours).all()
    assert np.abs(ours[np.asarray(mask)]).max() > 1e-4
    assert not np.abs(ours[~np.asarray(mask)]).max()
    assert not np.abs(theirs).max()


def test_the_target_s_missing_rows_have_no_mass():
    log_p = jnp.log(jnp.asarray([[0.5, 0.5]]))
    assert np.exp(match_vocabulary(log_p, 3)).tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ce": 0.0}, "all weights"),
        ({"kl": 1.0}, "need the target"),
        ({"teacher": "target"}, "do not use"),
        ({"kl": 1.0, "teacher": "stored"}, "top_k"),
        ({"kl": 1.0, "teacher": "stored", "top_k": 4, "temperature": 2.0}, "temperature 1"),
        ({"kl": -1.0, "teacher": "target"}, "negative"),
        ({"teacher": "oracle"}, "'none', 'target' or 'stored'"),
    ],
)
def test_mixtures_that_mean_nothing_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        LossConfig(**values)
