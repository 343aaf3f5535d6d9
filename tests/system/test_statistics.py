"""Intervals that hold the true value as often as they say, by drawing anew."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from scipy.stats import binomtest, norm

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


def test_one_seed_and_one_prompt() -> None:
    rewards = [1.0, 2.0, 6.0]
    mean, low, high = crossed_interval([rewards])
    deviation = math.sqrt(sum((r - 3) ** 2 for r in rewards) / 2)
    assert (mean, high - mean) == (3, pytest.approx(1.95996 * deviation / math.sqrt(3), rel=1e-4)) and low < mean
    assert crossed_interval([[2.0]]) == (2.0, 2.0, 2.0)
    assert crossed_interval([rewards]) == pytest.approx(mean_interval(rewards))


def test_against_scipy() -> None:
    assert pytest.approx(norm.ppf(0.975)) == Z95
    for won, n in ((0, 3), (7, 10), (30, 30)):
        rate, low, high = win_interval([1.0] * won + [0.0] * (n - won))
        wilson = binomtest(won, n).proportion_ci(method="wilson")
        assert (rate, low, high) == pytest.approx((won / n, wilson.low, wilson.high))


def test_pairs_take_out_what_both_have() -> None:
    """Prompts of very different rewards do not widen a difference's interval; a seed without a partner is left out."""
    easy = [float(10 * prompt) for prompt in range(30)]
    better = [[reward + 1 + seed / 10 for reward in easy] for seed in range(3)]
    mean, low, high = paired_interval(better, [easy] * 2)
    assert mean == pytest.approx(1.05) and high - low < 0.25
    assert high - low < 0.01 * (mean_interval(easy)[2] - mean_interval(easy)[1])
