"""Frechet distance between two sets of features (Heusel et al., 2017), named by the features.

The covariance is the plain one: no shrinkage and nothing added to its diagonal, which would make
another number of the same name. The trace of the matrix root comes from symmetric eigenvalues, so
it is real and defined for singular covariances too.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

# Only with these features is the distance called FID.
INCEPTION = "inception-v3-pool3"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """First and second moments of a set of features.

    Attributes:
        mean: float64 [d].
        covariance: float64 [d, d], divided by n - 1.
        n: Number of samples.
    """

    mean: np.ndarray
    covariance: np.ndarray
    n: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrechetDistance:
    """A distance and what it was measured with.

    Attributes:
        name: "fid", or "frechet_distance[<features>]" for all other features.
        value: The squared distance, >= 0; its unit is that of the features, squared.
        n: Samples on the smaller side. Values at different n do not compare: few samples bias
            the distance upwards.
        dimension: Of the features.
        interval: Bootstrap percentiles of both sides resampled, or None. They are biased upwards
            like any distance between fewer distinct samples, and may lie above `value`.
        seed: Of the bootstrap.
    """

    name: str
    value: float
    n: int
    dimension: int
    interval: tuple[float, float] | None = None
    seed: int | None = None


def statistics(batches: Iterable[np.ndarray]) -> Statistics:
    """Returns the moments of features that come in batches [b, d].

    Chan's update keeps what a plain sum of squares loses when means are far from 0.

    Raises:
        ValueError: Fewer than two samples, or features that are not finite.
    """
    n, mean, scatter = 0, np.zeros(()), np.zeros(())
    for batch in batches:
        batch = np.asarray(batch, np.float64)
        if batch.ndim != 2:
            raise ValueError(f"features must be [samples, dimensions], got shape {batch.shape}")
        if not np.isfinite(batch).all():
            raise ValueError(f"features of samples {n} to {n + len(batch)} are not all finite")
        if len(batch) == 0:
            continue
        batch_mean = batch.mean(axis=0)
        centred, shift = batch - batch_mean, batch_mean - mean
        total = n + len(batch)
        scatter = scatter + centred.T @ centred + np.outer(shift, shift) * (n * len(batch) / total)
        mean, n = mean + shift * (len(batch) / total), total
    if n < 2:
        raise ValueError(f"a covariance needs at least two samples, got {n}")
    return Statistics(mean, scatter / (n - 1), n)


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def distance(a: Statistics, b: Statistics) -> float:
    """Returns |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    (A B)^(1/2) has the eigenvalues of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.

    Raises:
        ValueError: The dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {a.mean.shape} and {b.mean.shape} dimensions do not compare")
    root = _root(a.covariance)
    product = root @ b.covariance @ root
    values = np.linalg.eigvalsh((product + product.T) / 2)
    trace = np.sqrt(np.maximum(values, 0)).sum()
    shift = a.mean - b.mean
    total = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace
    return float(max(total, 0.0))


def frechet_distance(
    features_a: np.ndarray,
    features_b: np.ndarray,
    *,
    features: str,
    force: bool = False,
    num_resamples: int = 0,
    seed: int = 0,
    level: float = 0.95,
) -> FrechetDistance:
    """Measures the distance between two sets of features.

    Args:
        features_a: One side, [n, d].
        features_b: The other side, [m, d]; the order of rows means nothing.
        features: What the features are; "inception-v3-pool3" makes it an FID.
        force: Measure even where 2 d samples a side are missing, so that covariances are close to
            singular and the bias outweighs the distance.
        num_resamples: Bootstrap resamples for an interval; each costs two eigendecompositions.
        seed: Of the bootstrap.
        level: Coverage of the interval.

    Returns:
        The distance.

    Raises:
        ValueError: Too few samples without `force`, or features of different dimensions.
    """
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    stats_a, stats_b = statistics([a]), statistics([b])
    n, dimension = min(stats_a.n, stats_b.n), len(stats_a.mean)
    if n < 2 * dimension and not force:
        raise ValueError(
            f"a Frechet distance of {features} features ({dimension} dimensions) from {n} samples "
            f"means little; use at least {2 * dimension} a side, features of fewer dimensions, or "
            "force=True"
        )
    value, interval = distance(stats_a, stats_b), None
    if num_resamples:
        rng = np.random.default_rng(seed)
        draws = [
            distance(
                statistics([a[rng.integers(len(a), size=len(a))]]),
                statistics([b[rng.integers(len(b), size=len(b))]]),
            )
            for _ in range(num_resamples)
        ]
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
        interval = (float(low), float(high))
    return FrechetDistance(
        name="fid" if features == INCEPTION else f"frechet_distance[{features}]",
        value=value,
        n=n,
        dimension=dimension,
        interval=interval,
        seed=seed if num_resamples else None,
    )
