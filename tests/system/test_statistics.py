"""Intervals that hold the true value as often as they say, by drawing anew."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from scipy.stats import binomtest, norm, t

from zopro.system import statistics
from zopro.system.statistics import Z95, crossed_interval, mean_interval, paired_interval, win_interval


def test_examples() -> None:
    failed, tried = doctest.testmod(statistics)
    assert tried and not failed


def test_the_interval_covers_what_it_should() -> None:
    """Prompts and seeds both drawn anew: the true mean, 0, is inside about 95 times in 100."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        prompts, seeds = torch.randn(40, generator=generator), torch.randn(12, generator=generator)
        _, low, high = crossed_interval((seeds[:, None] + prompts).tolist())
        inside += low <= 0 <= high
    assert 0.9 < inside / 400 < 0.985


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("between", [0.0, 0.3, 1.0])
def test_two_equal_methods_of_few_seeds_are_seldom_told_apart(seeds: int, between: float) -> None:
    """Whatever part of the spread is the seeds': with the normal quantile up to 3 in 10 are."""
    generator = torch.Generator().manual_seed(seeds)
    prompts = torch.randn(400, 1, 20, generator=generator)
    draws = (
        prompts
        + between * torch.randn(400, seeds, 1, generator=generator)
        + torch.randn(400, seeds, 20, generator=generator)
        for _ in range(2)
    )
    found = [paired_interval(*pair) for pair in zip(*(draw.tolist() for draw in draws), strict=True)]
    assert sum(low > 0 or high < 0 for _, low, high in found) / len(found) <= 0.07


def test_of_one_seed_it_is_student_s_over_prompts_and_of_one_prompt_over_seeds() -> None:
    rewards = [1.0, 2.0, 6.0]
    wanted = 3.0, *t.interval(0.95, 2, 3.0, math.sqrt(7 / 3))
    assert crossed_interval([rewards]) == pytest.approx(wanted)
    assert crossed_interval([[reward] for reward in rewards]) == pytest.approx(wanted)


def test_what_was_measured_once_has_no_bounds() -> None:
    for mean, low, high in (mean_interval([2.0]), crossed_interval([[2.0]]), paired_interval([[3.0]], [[1.0], [5.0]])):
        assert mean == 2 and math.isnan(low) and math.isnan(high)
    assert crossed_interval([[2.0, 2.0]]) == mean_interval([2.0, 2.0]) == (2.0, 2.0, 2.0), "twice the same"


def test_against_scipy() -> None:
    assert pytest.approx(norm.ppf(0.975)) == Z95
    for won, n in ((0, 3), (7, 10), (30, 30)):
        rate, low, high = win_interval([1.0] * won + [0.0] * (n - won))
        wilson = binomtest(won, n).proportion_ci(method="wilson")
        assert (rate, low, high) == pytest.approx((won / n, wilson.low, wilson.high))


def test_pairs_take_out_what_both_have() -> None:
    """Prompts of very different rewards do not widen a difference's interval; a seed without a partner is left out."""
    easy = [float(10 * prompt) for prompt in range(30)]
    better = [[reward + 1 + seed / 100 for reward in easy] for seed in range(3)]
    mean, low, high = paired_interval(better, [easy] * 2)
    assert mean == pytest.approx(1.005) and high - low < 0.25
    assert high - low < 0.01 * (mean_interval(easy)[2] - mean_interval(easy)[1])
