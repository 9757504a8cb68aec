"""Frechet distance against the textbook formula and against Gaussians known in closed form."""

import numpy as np
import pytest
import scipy.linalg

from vlv_jax.evaluation.frechet import INCEPTION, Statistics, distance, frechet_distance, statistics


def _features(rng, n, d, scale=1.0, shift=0.0):
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * scale + shift


def _textbook(a, b):
    """The formula as the original implementation has it, with a general matrix root."""
    mean, cov = a.mean(0) - b.mean(0), (np.cov(a.T), np.cov(b.T))
    root = scipy.linalg.sqrtm(cov[0] @ cov[1]).real
    return mean @ mean + np.trace(cov[0] + cov[1] - 2 * root)


def test_equals_the_textbook_formula(rng):
    a, b = _features(rng, 300, 12), _features(rng, 200, 12, 1.3, 0.2)
    result = frechet_distance(a, b, features="dino")
    assert result.value == pytest.approx(_textbook(a, b), rel=1e-9)
    assert (result.name, result.n, result.dimension) == ("frechet_distance[dino]", 200, 12)
    assert result.interval is None
    # Control: one feature of one set, moved by a hundredth.
    moved = b + np.eye(12)[0] * 0.01
    assert abs(frechet_distance(a, moved, features="dino").value / result.value - 1) > 1e-7


def test_gaussians_in_closed_form():
    spread_a, spread_b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.0])
    a = Statistics(np.zeros(3), np.diag(spread_a), 100)
    b = Statistics(np.array([1.0, 2.0, 0.0]), np.diag(spread_b), 100)
    want = 5 + ((np.sqrt(spread_a) - np.sqrt(spread_b)) ** 2).sum()
    assert distance(a, b) == pytest.approx(want, rel=1e-12)
    assert distance(b, a) == pytest.approx(want, rel=1e-12)


def test_rotation_changes_nothing(rng):
    a, b = _features(rng, 100, 6), _features(rng, 100, 6)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    turned = frechet_distance(a @ rotation, b @ rotation, features="x").value
    assert turned == pytest.approx(frechet_distance(a, b, features="x").value)


def test_the_same_set_is_at_zero_in_any_order(rng):
    a = _features(rng, 100, 6)
    assert frechet_distance(a, a[::-1], features="x").value < 1e-9


def test_singular_covariances_are_real_and_quiet(rng, recwarn):
    a, b = _features(rng, 8, 20), _features(rng, 9, 20)
    value = frechet_distance(a, b, features="x", force=True).value
    assert np.isfinite(value)
    assert value > 0
    assert not recwarn.list


def test_batches_far_from_zero_equal_one_batch(rng):
    features = _features(rng, 101, 5, shift=1e5)
    whole = statistics([features])
    parts = statistics([features[:1], features[1:40], features[40:40], features[40:]])
    np.testing.assert_allclose(parts.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(parts.covariance, np.cov(features.T), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(whole.covariance, parts.covariance, rtol=1e-6, atol=1e-9)
    assert parts.n == 101


def test_only_inception_features_make_an_fid(rng):
    a = _features(rng, 30, 3)
    assert frechet_distance(a, a, features=INCEPTION).name == "fid"


def test_bootstrap_interval_is_seeded_and_shrinks_with_n(rng):
    a, b = _features(rng, 4000, 3), _features(rng, 4000, 3, 1.2)
    few = frechet_distance(a[:100], b[:100], features="x", num_resamples=60, seed=1)
    again = frechet_distance(a[:100], b[:100], features="x", num_resamples=60, seed=1)
    many = frechet_distance(a, b, features="x", num_resamples=60, seed=1)
    assert few == again
    assert many.interval[0] < many.value < many.interval[1]
    assert np.diff(many.interval) < 0.5 * np.diff(few.interval)


def test_bad_input_is_refused(rng):
    a = _features(rng, 30, 16)
    with pytest.raises(ValueError, match="at least 32 a side"):
        frechet_distance(a, a, features="x")
    with pytest.raises(ValueError, match="at least two samples"):
        statistics([a[:1]])
    with pytest.raises(ValueError, match="do not compare"):
        frechet_distance(a, a[:, :4], features="x", force=True)
    a[3, 3] = np.nan
    with pytest.raises(ValueError, match="not all finite"):
        frechet_distance(a, a, features="x", force=True)
