"""Means with 95 % intervals: of independent values, of wins, and of values that are paired by prompt and seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean, stdev, variance

Z95 = NormalDist().inv_cdf(0.975)
"""Standard errors on either side of a mean that make a 95 % normal interval."""

Interval = tuple[float, float, float]  # mean, low, high


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % normal interval of independent values; the interval is the mean itself for a single value.

    >>> [round(x, 4) for x in mean_interval([1.0, 2.0, 3.0])], mean_interval([2.0])
    ([2.0, 0.8684, 3.1316], (2.0, 2.0, 2.0))
    """
    mean = fmean(values)
    half = Z95 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, mean - half, mean + half


def known_mean(values: Iterable[float]) -> float:
    """The mean of those that are not NaN; NaN where none is.

    >>> known_mean([1.0, float("nan"), 2.0]), known_mean([])
    (1.5, nan)
    """
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def win_interval(wins: Sequence[float]) -> Interval:
    """Win rate (ties count 0.5) and its 95 % Wilson score interval (Wilson 1927), which never leaves [0, 1].

    >>> [round(x, 4) for x in win_interval([1, 1, 1, 0])], [round(x, 4) for x in win_interval([1] * 8)]
    ([0.75, 0.3006, 0.9544], [1.0, 0.6756, 1.0])
    """
    n = len(wins)
    rate = fmean(wins)
    centre = (rate + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n * n))
    return rate, max(0.0, centre - half), min(1.0, centre + half)


def crossed_interval(values: Sequence[Sequence[float]]) -> Interval:
    """Mean and 95 % normal interval of values [seed][prompt], all seeds measured on the same prompts.

    The variance of the mean is that over prompts (of each prompt's mean over seeds) plus that over seeds (of each
    seed's mean): prompts and trainings are both samples of what could have been. Of one seed it is `mean_interval`.

    >>> crossed_interval([[1.0, 3.0], [3.0, 5.0]])[0]
    3.0
    """
    means = [fmean(of_prompt) for of_prompt in zip(*values, strict=True)]
    of_seeds = [fmean(of_seed) for of_seed in values]
    spread = variance(means) / len(means) if len(means) > 1 else 0.0
    spread += variance(of_seeds) / len(of_seeds) if len(of_seeds) > 1 else 0.0
    mean, half = fmean(means), Z95 * math.sqrt(spread)
    return mean, mean - half, mean + half


def paired_interval(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Interval:
    """`crossed_interval` of first - second, [seed][prompt], of the seeds that both have.

    >>> paired_interval([[2.0, 9.0]], [[1.0, 8.0]])
    (1.0, 1.0, 1.0)
    """
    pairs = zip(first, second, strict=False)
    return crossed_interval([[a - b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in pairs])
