"""Means with 95 % intervals: of independent values, of wins, and of values that are paired by prompt and seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean, stdev, variance

Z95 = NormalDist().inv_cdf(0.975)
"""Standard errors on either side of a mean that make a 95 % normal interval."""

Interval = tuple[float, float, float]  # mean, low, high; the bounds are NaN where nothing was repeated


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % normal interval of independent values; a single value has no bounds, but NaN.

    Normal, so of many values: of ten it holds the true mean 92 times in 100.

    >>> [round(x, 4) for x in mean_interval([1.0, 2.0, 3.0])], mean_interval([2.0])
    ([2.0, 0.8684, 3.1316], (2.0, nan, nan))
    """
    mean = fmean(values)
    half = Z95 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
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
    """Mean and 95 % interval of values [seed][prompt], all seeds measured on the same prompts.

    The variance of the mean is V_P + V_S: that over prompts (of each prompt's mean over seeds) and that over seeds (of
    each seed's mean), since prompts and trainings are both samples of what could have been. Each is estimated from as
    many values as there are, and has Student's t of its own: half^2 = t_P^2 V_P + t_S^2 V_S holds the true mean at least
    95 times in 100, of two seeds too (Banerjee 1960). One t with Satterthwaite's degrees of freedom, which are estimated
    as well, lets it out up to 12 times in 100 there. Assumed: prompts and seeds are independent, and their means normal.

    Of one seed the interval is over prompts alone, and says nothing about another training; of one prompt it is over
    seeds alone. Of one of each there are no bounds, but NaN.

    >>> [round(x, 2) for x in crossed_interval([[1.0, 3.0, 5.0]])], crossed_interval([[2.0]])
    ([3.0, -1.97, 7.97], (2.0, nan, nan))
    """
    of_prompts = [fmean(of_prompt) for of_prompt in zip(*values, strict=True)]
    of_seeds = [fmean(of_seed) for of_seed in values]
    repeated = [means for means in (of_prompts, of_seeds) if len(means) > 1]
    half = math.hypot(*map(_half_width, repeated)) if repeated else math.nan
    mean = fmean(of_prompts)
    return mean, mean - half, mean + half


def _half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean of two or more independent normal values (Student 1908)."""
    from scipy.special import stdtrit  # here alone: it takes a while to import

    return float(stdtrit(len(values) - 1, 0.975)) * math.sqrt(variance(values) / len(values))


def paired_interval(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Interval:
    """`crossed_interval` of first - second, [seed][prompt], of the seeds that both have.

    >>> paired_interval([[2.0, 9.0]], [[1.0, 8.0]])
    (1.0, 1.0, 1.0)
    """
    pairs = zip(first, second, strict=False)
    return crossed_interval([[a - b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in pairs])
