"""Chance levels and intervals against simulation, and what they must say of related and unrelated trajectories."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from walks import dense_walk, lora_walk
from zopro.analysis.analyse import analyse
from zopro.analysis.numbers import chance
from zopro.analysis.numbers.series import BETWEEN, WITHIN, SixSums
from zopro.analysis.numbers.summary import whole
from zopro.analysis.reading.checkpoints import of_folder


def analysed(folder, p: np.ndarray, r: np.ndarray) -> dict[str, Any]:
    walks = dense_walk(folder / "p", p), dense_walk(folder / "r", r)
    return analyse(*(of_folder(walk.folder, name) for walk, name in zip(walks, ("policy", "reward"), strict=True)))


@pytest.mark.parametrize("dimension", [2, 3, 10, 200])
def test_the_chance_band_holds_95_percent_of_random_directions(dimension):
    a, b = np.random.default_rng(dimension).normal(size=(2, 20_000, dimension))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    inside = np.mean(np.abs(cosines) <= chance.cosine_half_width(dimension))
    assert inside == pytest.approx(0.95, abs=0.006)


def test_one_dimension_has_no_other_direction():
    assert chance.cosine_half_width(1) == 1


def test_a_huge_dimension_is_normal():
    assert chance.cosine_half_width(10**9) == pytest.approx(1.959964 / np.sqrt(1e9), rel=1e-4)


def test_bands_are_in_the_unit_of_their_metric(tmp_path):
    p, r = np.random.default_rng(0).normal(size=(2, 4, 600)).cumsum(1)
    found = analysed(tmp_path, p, r)["chance"]
    half = chance.cosine_half_width(600)
    angle = found["update_angle_degrees"]["product"]
    assert angle["expected"] == [90] * 3
    np.testing.assert_allclose(angle["high"], np.degrees(np.arccos(-half)))
    assert found["policy_momentum_cosine"]["product"]["high"] == [None, *[pytest.approx(half)] * 2]
    lengths = np.linalg.norm(np.diff(p, axis=0), axis=1)
    error = found["policy_extrapolation_error"]["product"]
    np.testing.assert_allclose(error["expected"][1:], np.sqrt(1 + (lengths[:-1] / lengths[1:]) ** 2))
    assert error["low"][1] < error["expected"][1] < error["high"][1]


def test_related_updates_lie_outside_and_unrelated_ones_inside(tmp_path):
    generator = np.random.default_rng(0)
    u, v = generator.normal(size=(2, 6, 3000))
    start = np.zeros((1, 3000))
    apart = analysed(tmp_path / "1", *(np.concatenate([start, x.cumsum(0)]) for x in (u, v)))
    near = analysed(tmp_path / "2", *(np.concatenate([start, x.cumsum(0)]) for x in (u, v + u)))
    for name in ("update_angle_degrees", "update_pearson", "update_distance_correlation"):
        for numbers, related in ((apart, False), (near, True)):
            values, band = numbers["metrics"][name]["product"], numbers["chance"][name]["product"]
            shuffled = numbers["permutation"][name]["product"]
            rows = zip(values, band["low"], band["high"], shuffled, strict=True)
            outside = [not (low <= x <= high) and not (a <= x <= b) for x, low, high, (a, b) in rows]
            assert all(outside) if related else sum(outside) <= 1
    intervals = near["intervals"]["update_angle_degrees"]["product"]
    rows = zip(near["metrics"]["update_angle_degrees"]["product"], intervals, strict=True)
    assert all(low < value < high < 80 for value, (low, high) in rows)


def test_the_band_of_the_distance_correlation_holds_95_of_100(monkeypatch):
    """39 draws have its ends as their extremes; the usual quantiles of 39 have those of 90 of 100."""
    values = np.random.default_rng(0).permutation(np.linspace(0.01, 0.39, chance.SHUFFLES))
    drawn = iter([*values, *values])
    monkeypatch.setattr(chance, "distance_correlation", lambda a, b: next(drawn))
    pairs = [(np.zeros(3), np.zeros(3))]
    assert chance.shuffled_distance_correlation(pairs, 0) == pytest.approx((0.01, 0.39))
    mean, low, high = chance.distance_correlation_chance.__wrapped__(3, 0)
    assert (low, high) == pytest.approx((0.01, 0.39)) and mean == pytest.approx(0.2)


@pytest.mark.parametrize(("moving", "known"), [(3, True), (1, False)])
def test_an_interval_is_of_the_draws_that_are_defined(tmp_path, moving, known):
    """Of six tensors drawn again three that move are left out 1 time in 64; one is left out 1 time in 3."""
    p, r = np.random.default_rng(0).normal(size=(2, 4, 600)).cumsum(1)
    p[:, 100 * moving :] = 1.0
    numbers = analysed(tmp_path, p, r)
    found, shuffled = numbers["intervals"], numbers["permutation"]
    for name in ("update_angle_degrees", "update_pearson", "policy_momentum_cosine", "procrustes_disparity"):
        pairs = found[name]["product"]
        pair = pairs if name == "procrustes_disparity" else pairs[-1]
        assert (pair is not None) == known and (not known or pair[0] < pair[1])
    assert None not in found["reward_momentum_cosine"]["product"][1:]
    assert all(shuffled[name]["product"] == [None] * 3 for name in ("update_pearson", "policy_momentum_cosine"))
    assert None not in shuffled["reward_momentum_cosine"]["product"][1:]


@pytest.mark.parametrize("tensors", [5, 6, 20])
@pytest.mark.parametrize("moved", [5, 6])
@pytest.mark.parametrize("metric", [BETWEEN[0], BETWEEN[2], WITHIN[0], WITHIN[2]], ids=lambda metric: metric.name)
def test_signs_that_are_all_alike_lie_outside_or_say_nothing(metric, moved, tensors):
    """All signs of five tensors are alike in 1 of 32 cases on either side, which is more than 2.5 %."""
    generator = np.random.default_rng(moved)
    u = np.zeros((tensors, 50))
    u[:moved] = generator.normal(size=(min(moved, tensors), 50))
    v = u + 0.3 * (u != 0) * generator.normal(size=u.shape)
    ab, aa, bb = ((x * y).sum(1, keepdims=True) for x, y in ((u, v), (u, u), (v, v)))
    count = np.full((tensors, 1), 50.0)
    sums = SixSums(ab, aa, bb, u.sum(1, keepdims=True), v.sum(1, keepdims=True), count, 1e-12 * aa, 1e-12 * bb)
    for seed in range(20):
        tails = chance.sign_flips(metric, sums, whole(sums), seed)
        if min(moved, tensors) < 6:
            assert tails is None or np.isnan(tails).all()
        else:
            low, high = tails[:, 0]
            assert not low <= metric.value(whole(sums))[0, 0] <= high


def test_random_walks_have_a_disparity_inside_the_band(tmp_path):
    p, r = np.random.default_rng(1).normal(size=(2, 6, 600)).cumsum(1)
    found = analysed(tmp_path, p, r)
    band = found["chance"]["procrustes_disparity"]["product"]
    assert band["low"] <= found["metrics"]["procrustes_disparity"]["product"] <= band["high"] < 0.1


def test_everything_follows_from_the_seed(tmp_path):
    walks = [of_folder(lora_walk(tmp_path / name, seed=seed).folder, name) for seed, name in enumerate("pr")]
    first, same, other = (analyse(*walks, seed=seed, coordinates=50) for seed in (0, 0, 1))
    assert first == same
    assert first["metrics"]["update_angle_degrees"] == other["metrics"]["update_angle_degrees"]
    assert first["metrics"]["update_distance_correlation"] != other["metrics"]["update_distance_correlation"]
    assert first["distance_correlation_coordinates"] == {"factors": 50, "product": 50}
