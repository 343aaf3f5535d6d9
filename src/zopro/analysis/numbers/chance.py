"""What a number would be by chance, and how certain it is.

Three intervals, all 95 %, are kept apart:

- chance: two independent uniformly random directions in the same number of dimensions. Their cosine c has
  c^2 ~ Beta(1/2, (D - 1)/2) (Fisher 1915, for correlations), about 0 +- 1.96 / sqrt(D).
- bootstrap: the value itself, with the tensors of the model drawn again with replacement (Efron 1979). Coordinates of
  one tensor move together, so tensors and not coordinates are the sample; for that reason it is wider than the first.
- permutation: the value if there were no relation between the two. Cosines: every tensor's inner product keeps its size
  and gets a random sign, which keeps each tensor's length and structure. Distance correlation: shuffled coordinates,
  pooled over iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final

import numpy as np
from scipy.special import betaincinv

from zopro.analysis.numbers.series import ZERO, Metric, SixSums, extrapolation_error, pearson
from zopro.analysis.numbers.shape import disparity_of_points, distance_correlation, procrustes_disparity, random_walks

DRAWS = 1000  # of bootstrap and sign-flip samples
SHUFFLES = 39  # of a distance correlation, each O(D log D): 39 give the 2.5 % and 97.5 % points as its extremes
BATCH = 50  # draws of trajectories held at a time
MIN_PARTS = 5  # tensors below which resampling them says nothing
MIN_SIGNS = 6  # tensors that moved: of fewer, all signs are alike in more than 2.5 % of the cases
APART = 1 - 1e-9  # keeps such a case outside of the band, whatever rounding does
UNDEFINED = 0.05  # of the draws: where the value is defined in fewer than the others, there is no interval
TAILS = (0.025, 0.975)
EXPECTED: Final = "weibull"  # numpy's way to say between which values one more draw lies in so many of 100 cases


def cosine_half_width(dimension: int) -> float:
    """c with P(|cos| <= c) = 0.95 for random directions in `dimension` dimensions.

    >>> round(cosine_half_width(10_000) * 100, 2)
    1.96
    """
    return 1.0 if dimension < 2 else float(np.sqrt(betaincinv(0.5, (dimension - 1) / 2, 0.95)))


def of_random_directions(metric: Metric, total: SixSums, dimension: int) -> dict[str, np.ndarray]:
    """`expected`, `low` and `high` [iterations] of a metric for random directions of the lengths that were measured."""
    half = cosine_half_width(dimension - 1 if metric.centred else dimension)
    length = np.sqrt(np.maximum(total.aa * total.bb, 0))
    return {
        name: _with_cosine(metric, total, length, value)
        for name, value in (("expected", 0.0), ("low", -half), ("high", half))
    }


def _with_cosine(metric: Metric, total: SixSums, length: np.ndarray, value: float) -> np.ndarray:
    if metric.value is pearson:
        return np.where(np.isnan(pearson(total)), np.nan, value)[0]
    return np.asarray(metric.value(replace(total, ab=value * length)))[0]


def ordered(band: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`low` under `high` also where the metric falls as the cosine rises."""
    return {**band, "low": np.minimum(band["low"], band["high"]), "high": np.maximum(band["low"], band["high"])}


def bootstrap(metric: Metric, sums: SixSums, seed: int) -> np.ndarray | None:
    """[2, iterations] low and high, or None with too few tensors."""
    parts = len(sums.count)
    if parts < MIN_PARTS:
        return None
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(parts, np.full(parts, 1 / parts), DRAWS).astype(float)
    return _tails(metric.value(sums.weighted(weights)))


def sign_flips(metric: Metric, sums: SixSums, total: SixSums, seed: int) -> np.ndarray | None:
    """[2, iterations] low and high if the sign of every tensor's inner product were a coin's; NaN where too few moved."""
    parts = len(sums.count)
    if parts < MIN_SIGNS:
        return None
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (DRAWS, parts))
    ab = np.nan_to_num(sums.ab)
    moved = np.abs(ab) > ZERO * np.sqrt(np.abs(np.nan_to_num(sums.aa * sums.bb))).max(0)
    enough = np.where(moved.sum(0) < MIN_SIGNS, np.nan, 1.0)
    if metric.value is pearson:
        mean_a, mean_b = total.a1 / total.count, total.b1 / total.count
        covariance = sums.ab - mean_a * sums.b1 - mean_b * sums.a1 + sums.count * mean_a * mean_b
        spread = np.sqrt((total.aa - total.a1 * mean_a) * (total.bb - total.b1 * mean_b))
        spread = np.where(np.isnan(pearson(total)), np.nan, spread)
        return _tails(enough * _flipped(signs, covariance) / spread)
    return _tails(metric.value(replace(total, ab=enough * _flipped(signs, ab) + 0 * total.ab)))


def _flipped(signs: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """[draws, iterations] sums over parts of inner products [n, iterations] with these signs."""
    most = APART * np.abs(inner).sum(0)
    return np.clip(signs @ inner, -most, most)


def resampled(metric: Metric) -> bool:
    """Whether intervals of a metric mean something: lengths add up over tensors, they are no mean of them."""
    return metric.value is extrapolation_error or not metric.name.endswith("_norm")


def _tails(values: np.ndarray) -> np.ndarray:
    """[draws, iterations] -> [2, iterations]; NaN where an iteration is not defined."""
    return np.stack([_tails_of(column) for column in values.T], axis=1)


def _tails_of(draws: np.ndarray) -> np.ndarray:
    """[draws] -> [2] of those that are defined; NaN where too many are not.

    Tensors drawn again may leave out the few that moved, and with them the direction.
    """
    defined = draws[~np.isnan(draws)]
    return np.quantile(defined, TAILS) if len(defined) >= (1 - UNDEFINED) * len(draws) else np.full(2, np.nan)


@lru_cache
def distance_correlation_chance(size: int, seed: int) -> tuple[float, float, float]:
    """Mean, low and high of the distance correlation of `size` independent normal pairs."""
    generator = np.random.default_rng(seed)
    values = [distance_correlation(*generator.standard_normal((2, size))) for _ in range(SHUFFLES)]
    return _mean_and_tails(np.array(values))


def shuffled_distance_correlation(pairs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int) -> tuple[float, float]:
    """Low and high with the coordinates of one of the two shuffled, pooled over all `pairs` (one per iteration).

    Without a relation the estimate hardly depends on what the coordinates are, only on how many there are.
    """
    generator = np.random.default_rng(seed)
    each = -(-SHUFFLES // len(pairs))
    values = [distance_correlation(a, generator.permutation(b)) for a, b in pairs for _ in range(each)]
    low, high = np.quantile(values, TAILS, method=EXPECTED)
    return float(low), float(high)


def _mean_and_tails(values: np.ndarray) -> tuple[float, float, float]:
    low, high = np.quantile(values, TAILS, method=EXPECTED)
    return float(values.mean()), float(low), float(high)


def procrustes_chance(policy: np.ndarray, reward: np.ndarray, dimension: int, seed: int) -> tuple[float, float, float]:
    """Mean, low and high disparity of random walks with the step lengths of these trajectories' Gram matrices.

    In many dimensions random steps are orthogonal, and a rotation turns any orthogonal steps into any others: random
    walks of equal step lengths have a disparity near 0. Only what exceeds this band says that the paths differ.
    """
    generator = np.random.default_rng(seed)
    lengths = [step_lengths(gram) for gram in (policy, reward)]
    batches = [
        disparity_of_points(*(random_walks(steps, dimension, BATCH, generator) for steps in lengths))
        for _ in range(DRAWS // BATCH)
    ]
    values = np.concatenate(batches)
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    return _mean_and_tails(values)


def step_lengths(gram: np.ndarray) -> np.ndarray:
    """[T - 1] distances between successive points."""
    diagonal = np.diagonal(gram)
    return np.sqrt(np.maximum(diagonal[1:] + diagonal[:-1] - 2 * np.diagonal(gram, 1), 0))


def procrustes_bootstrap(policy: np.ndarray, reward: np.ndarray, seed: int) -> tuple[float, float] | None:
    """Low and high of the disparity over tensors drawn again; `policy`, `reward` are [n, T, T]."""
    parts = len(policy)
    if parts < MIN_PARTS:
        return None
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(DRAWS // BATCH):
        weights = generator.multinomial(parts, np.full(parts, 1 / parts), BATCH).astype(float)
        values.append(procrustes_disparity(*(np.tensordot(weights, gram, 1) for gram in (policy, reward))))
    low, high = _tails_of(np.concatenate(values))
    return (float(low), float(high)) if np.isfinite([low, high]).all() else None
