"""Bootstrap intervals: coverage, pairing, and equality with one resample at a time."""

import numpy as np
import pytest

from core_jax.evaluation import bootstrap
from core_jax.evaluation.bootstrap import (
    bootstrap_difference,
    bootstrap_f1,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_sums,
    micro_f1,
    resampled_sums,
)


def test_mean_interval_is_that_of_the_normal_approximation(rng):
    values = rng.normal(3, 2, 2000)
    estimate = bootstrap_mean(values, seed=1)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert estimate.value == pytest.approx(values.mean())
    np.testing.assert_allclose(
        [estimate.low, estimate.high],
        [values.mean() - half, values.mean() + half],
        atol=0.15 * half,
    )


def test_intervals_cover_the_truth_about_as_often_as_they_say(rng):
    covered = 0
    for trial in range(300):
        estimate = bootstrap_mean(rng.exponential(1.0, 80), seed=trial, num_resamples=400)
        covered += estimate.low <= 1.0 <= estimate.high
    assert 0.88 < covered / 300 < 0.98


def test_equals_resampling_examples_one_at_a_time(rng):
    rows = rng.integers(0, 9, (7, 3)).astype(float)
    counts = np.random.default_rng(5).multinomial(7, np.full(7, 1 / 7), size=50)
    slow = np.stack([np.repeat(rows, c, axis=0).sum(0) for c in counts])
    np.testing.assert_allclose(resampled_sums(rows, seed=5, num_resamples=50), slow)


def test_blocks_do_not_change_the_result(rng, monkeypatch):
    rows = rng.normal(size=(10, 2))
    whole = resampled_sums(rows, seed=0, num_resamples=33)
    monkeypatch.setattr(bootstrap, "_BLOCK", 50)
    np.testing.assert_array_equal(resampled_sums(rows, seed=0, num_resamples=33), whole)


def test_seed_decides_the_interval(rng):
    values = rng.normal(size=50)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1).low != bootstrap_mean(values, seed=2).low


def test_f1_and_ratio_by_hand():
    rows = np.array([[2, 3, 2, 2], [0, 1, 1, 4]])
    estimate = bootstrap_f1(rows, num_resamples=200)
    assert estimate.value == pytest.approx(2 * (2 / 4) * (3 / 6) / (2 / 4 + 3 / 6))
    assert estimate.low == pytest.approx(0)  # twice the second example: no precision
    assert estimate.high == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert bootstrap_ratio([1, 2], [4, 2]).value == pytest.approx(0.5)
    assert bootstrap_ratio([0, 0], [0, 0]).value == 0


def test_pairing_sees_a_difference_that_the_spread_hides(rng):
    a = rng.normal(0, 10, 200)
    b = a - 0.5 + rng.normal(0, 0.1, 200)
    assert bootstrap_difference(a, b).excludes_zero
    assert not bootstrap_difference(a, rng.permutation(b)).excludes_zero
    assert not bootstrap_difference(a, a).excludes_zero


def test_paired_difference_of_f1(rng):
    rows = np.stack([rng.integers(0, 3, 60), np.full(60, 3)] * 2, axis=1)
    worse = rows.copy()
    worse[::2, 0::2] = np.maximum(worse[::2, 0::2] - 1, 0)
    estimate = bootstrap_difference(rows, worse, micro_f1)
    assert estimate.value == pytest.approx(micro_f1(rows.sum(0)) - micro_f1(worse.sum(0)))
    assert estimate.excludes_zero


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match=r"examples \[1\] are not finite"):
        bootstrap_mean([1.0, float("nan")])
    with pytest.raises(ValueError, match="same examples"):
        bootstrap_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="level=2"):
        bootstrap_sums(np.ones((2, 1)), lambda s: s[..., 0], level=2)
