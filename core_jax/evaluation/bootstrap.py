"""Seeded percentile bootstrap intervals of statistics that are functions of sums.

Means, ratios of sums (micro F1, accuracy over clustered questions) and BLEU all have the form
f(sum over examples of a row of numbers). One resample of n examples is then a row of n
multinomial counts, and a thousand of them a matrix product (Efron and Tibshirani, 1993, chapter
13). The same n and seed always draw the same resamples, so that intervals of several metrics over
the same examples belong together.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

# Entries of one block of resampling counts: bounds the memory, not the result.
_BLOCK = 4_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        value: The statistic on all examples.
        low: Lower end of the interval.
        high: Upper end.
        n: Number of examples (clusters) that were resampled.
        seed: Seed of the resampling.
        num_resamples: Number of resamples.
        level: Coverage that the interval aims at.
    """

    value: float
    low: float
    high: float
    n: int
    seed: int
    num_resamples: int
    level: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, the interval as a pair."""
        return {
            "value": self.value,
            "interval": [self.low, self.high],
            "level": self.level,
            "n": self.n,
            "seed": self.seed,
            "num_resamples": self.num_resamples,
        }


def bootstrap_sums(
    rows: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    num_resamples: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """Bootstraps statistic(sum of rows).

    Args:
        rows: One row of addends per example, [n, k].
        statistic: Maps sums [..., k] to values [...]; must accept leading axes.
        seed: Seed of the resampling.
        num_resamples: Number of resamples.
        level: Coverage of the interval, in (0, 1).

    Returns:
        The estimate. A single example gives an interval of no width.

    Raises:
        ValueError: There are no examples, a row is not finite, or an argument is out of range.
    """
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2 or rows.shape[0] == 0:
        raise ValueError(f"bootstrap needs at least one example in rows [n, k], got {rows.shape}")
    if not np.isfinite(rows).all():
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        raise ValueError(f"values of examples {bad[:8].tolist()} are not finite")
    if num_resamples < 1 or not 0 < level < 1:
        raise ValueError(f"num_resamples={num_resamples}, level={level} make no interval")
    draws = statistic(resampled_sums(rows, seed=seed, num_resamples=num_resamples))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(
        value=float(statistic(rows.sum(axis=0))),
        low=float(low),
        high=float(high),
        n=len(rows),
        seed=seed,
        num_resamples=num_resamples,
        level=level,
    )


def resampled_sums(rows: np.ndarray, *, seed: int, num_resamples: int) -> np.ndarray:
    """Returns the sums of `num_resamples` resamples of the rows [n, k], as [num_resamples, k]."""
    rng, n = np.random.default_rng(seed), len(rows)
    sums = np.empty((num_resamples, rows.shape[1]))
    chances, block = np.full(n, 1 / n), max(1, _BLOCK // n)
    for start in range(0, num_resamples, block):
        stop = min(start + block, num_resamples)
        sums[start:stop] = rng.multinomial(n, chances, size=stop - start) @ rows
    return sums


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Returns numerator / denominator, 0 where the denominator is 0."""
    denominator = np.asarray(denominator, np.float64)
    zero = denominator == 0
    return np.where(zero, 0.0, numerator / np.where(zero, 1.0, denominator))


def bootstrap_mean(values, **options) -> Estimate:
    """Interval of a mean over examples; `options` as for `bootstrap_sums`."""
    values = np.asarray(values, np.float64).reshape(-1, 1)
    return bootstrap_sums(values, lambda sums: sums[..., 0] / len(values), **options)


def bootstrap_ratio(numerators, denominators, **options) -> Estimate:
    """Interval of sum(numerators) / sum(denominators), one pair of numbers per example."""
    rows = np.stack([np.asarray(numerators, float), np.asarray(denominators, float)], axis=1)
    return bootstrap_sums(rows, lambda sums: ratio(sums[..., 0], sums[..., 1]), **options)


def bootstrap_quotient(rows_a, rows_b, **options) -> Estimate:
    """Interval of (sum a0 / sum a1) / (sum b0 / sum b1), rows [n, 2] of the same examples."""
    rows = np.concatenate([np.asarray(rows_a, float), np.asarray(rows_b, float)], axis=1)
    return bootstrap_sums(
        rows, lambda s: ratio(ratio(s[..., 0], s[..., 1]), ratio(s[..., 2], s[..., 3])), **options
    )


def micro_f1(sums: np.ndarray) -> np.ndarray:
    """F1 of summed counts [..., 4] = (true of predicted, predicted, found of true, true)."""
    precision, recall = ratio(sums[..., 0], sums[..., 1]), ratio(sums[..., 2], sums[..., 3])
    return ratio(2 * precision * recall, precision + recall)


def bootstrap_f1(rows, **options) -> Estimate:
    """Interval of the micro F1 of per-example counts [n, 4], see `micro_f1`."""
    return bootstrap_sums(rows, micro_f1, **options)


def bootstrap_difference(
    rows_a, rows_b, statistic: Callable[[np.ndarray], np.ndarray] | None = None, **options
) -> Estimate:
    """Interval of statistic(a) - statistic(b) where row i of both is of the same example.

    Args:
        rows_a: Addends of the first system, [n, k], or one value per example, [n].
        rows_b: Those of the second, in the same order.
        statistic: As for `bootstrap_sums`; None is the mean of one value per example.
        **options: As for `bootstrap_sums`.

    Returns:
        The estimate; `excludes_zero` says whether the systems differ.

    Raises:
        ValueError: The systems were not measured on the same number of examples.
    """
    rows_a, rows_b = np.asarray(rows_a, np.float64), np.asarray(rows_b, np.float64)
    if rows_a.shape != rows_b.shape:
        raise ValueError(
            f"paired differences need the same examples: {rows_a.shape} and {rows_b.shape}"
        )
    if statistic is None:
        return bootstrap_mean(rows_a - rows_b, **options)
    width = rows_a.shape[1]
    return bootstrap_sums(
        np.concatenate([rows_a, rows_b], axis=1),
        lambda sums: statistic(sums[..., :width]) - statistic(sums[..., width:]),
        **options,
    )
