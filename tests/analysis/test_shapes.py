"""Metrics of shapes whose answer is known, and what they must not depend on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import procrustes

from walks import Walk, analysed, defined_dcor, dense_walk
from zopro.analysis.numbers.chance import cosine_half_width
from zopro.analysis.numbers.shape import disparity_of_points, distance_correlation, procrustes_disparity
from zopro.analysis.page.figures import span, table


def line(tmp_path: Path, name: str, direction: np.ndarray, steps: int = 4) -> Walk:
    return dense_walk(tmp_path / name, np.arange(steps + 1)[:, None] * direction + 1.0)


def test_parallel_and_orthogonal_lines(tmp_path):
    x, y = np.eye(12)[:2]
    same = analysed(line(tmp_path, "a", x), line(tmp_path, "b", 3 * x))["metrics"]
    assert same["update_angle_degrees"]["product"] == [0] * 4
    assert same["policy_momentum_cosine"]["product"] == [None, 1, 1, 1]
    assert same["policy_extrapolation_error"]["product"] == [None, 0, 0, 0]
    assert same["velocity_angle_degrees"]["product"] == [None] * 4  # a straight line has no velocity change
    across = analysed(line(tmp_path, "c", x), line(tmp_path, "d", y))["metrics"]
    assert across["update_angle_degrees"]["product"] == [90] * 4
    assert across["procrustes_disparity"]["product"] == pytest.approx(0, abs=1e-12)  # a rotation apart
    back = analysed(line(tmp_path, "e", x), line(tmp_path, "f", -x))["metrics"]
    assert back["update_angle_degrees"]["product"] == [180] * 4


def test_a_circle_turns_by_the_same_angle(tmp_path):
    turn = np.linspace(0, 2 * np.pi, 9)
    circle = np.zeros((9, 12))
    circle[:, 3], circle[:, 8] = np.cos(turn), np.sin(turn)
    wide = 5 * circle[:, ::-1]
    found = analysed(dense_walk(tmp_path / "p", circle), dense_walk(tmp_path / "r", wide), projections=("pca",))
    momentum = found["metrics"]["policy_momentum_cosine"]["product"]
    np.testing.assert_allclose(momentum[1:], np.cos(2 * np.pi / 8))
    assert found["metrics"]["procrustes_disparity"]["product"] == pytest.approx(0, abs=1e-12)


def test_what_does_not_move_has_no_angle(tmp_path):
    x = np.eye(12)[0]
    still = dense_walk(tmp_path / "r", np.ones((4, 12)))
    found = analysed(line(tmp_path, "p", x, 3), still)["metrics"]
    for name in ("update_angle_degrees", "update_pearson", "update_distance_correlation"):
        assert found[name]["product"] == [None] * 3
    assert found["procrustes_disparity"]["product"] is None
    assert found["policy_momentum_cosine"]["product"] == [None, 1, 1]


@pytest.mark.parametrize("small", [0, 1])
def test_one_model_s_small_updates_are_there_beside_the_other_s_large_ones(tmp_path, small):
    walks = np.random.default_rng(0).normal(size=(2, 4, 60)).cumsum(1)
    wanted = analysed(*(dense_walk(tmp_path / f"p{i}", walk) for i, walk in enumerate(walks)))["metrics"]
    walks[small] *= 1e-8
    found = analysed(*(dense_walk(tmp_path / f"r{i}", walk) for i, walk in enumerate(walks)))["metrics"]
    for name in ("update_angle_degrees", "update_pearson", "policy_momentum_cosine", "reward_momentum_cosine"):
        np.testing.assert_allclose(*(np.array(values[name]["product"], float) for values in (found, wanted)), rtol=1e-6)


def test_one_iteration_has_no_shape(tmp_path):
    """Two points of each, centred and of one length, always fit."""
    p, r = np.random.default_rng(0).normal(size=(2, 3, 60))
    once = analysed(dense_walk(tmp_path / "p", p[:2]), dense_walk(tmp_path / "r", r[:2]))
    twice = analysed(dense_walk(tmp_path / "q", p), dense_walk(tmp_path / "s", r))
    for tables in (once, twice["off_by_one"]):
        assert tables["metrics"]["procrustes_disparity"]["product"] is None
        assert tables["intervals"]["procrustes_disparity"]["product"] is None
    assert twice["metrics"]["procrustes_disparity"]["product"] > 0


def test_trajectories_of_different_lengths(tmp_path):
    p, r = np.random.default_rng(0).normal(size=(2, 5, 60)).cumsum(1)
    whole = analysed(dense_walk(tmp_path / "p", p), dense_walk(tmp_path / "r", r[:3]))
    bands = {row.name: row.chance for row in table(whole, whole)}
    half = cosine_half_width(60)
    assert bands["update_angle_degrees"] == span(np.degrees(np.arccos([half, -half])), 2), "that of the last that has one"
    found = whole["metrics"]
    assert found["update_angle_degrees"]["product"][2:] == [None, None]
    assert None not in found["update_angle_degrees"]["product"][:2]
    assert found["procrustes_disparity"]["product"] == pytest.approx(procrustes(p[:3], r[:3])[2])


# Invariances.

TRAJECTORIES = st.tuples(st.integers(2, 7), st.integers(1, 9), st.integers(0, 2**32 - 1))


def trajectories(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    steps, dimension, seed = shape
    generator = np.random.default_rng(seed)
    return *generator.normal(size=(2, steps, dimension)), generator


@settings(max_examples=60, deadline=None)
@given(TRAJECTORIES)
def test_procrustes_is_scipys(shape):
    x, y, _ = trajectories(shape)
    assert procrustes_disparity(x @ x.T, y @ y.T) == pytest.approx(procrustes(x, y)[2], abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(TRAJECTORIES, st.floats(0.01, 100))
def test_procrustes_knows_no_place_rotation_or_size(shape, scale):
    x, y, generator = trajectories(shape)
    rotation, _ = np.linalg.qr(generator.normal(size=(x.shape[1], x.shape[1])))
    moved = scale * x @ rotation + generator.normal(size=x.shape[1])
    assert procrustes_disparity(x @ x.T, moved @ moved.T) == pytest.approx(0, abs=1e-7)
    wanted = procrustes_disparity(x @ x.T, y @ y.T)
    assert procrustes_disparity(moved @ moved.T, y @ y.T) == pytest.approx(wanted, abs=1e-7)
    assert procrustes_disparity(y @ y.T, x @ x.T) == pytest.approx(wanted, abs=1e-7)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-4, 1e4))
def test_metrics_know_no_unit_or_origin(tmp_path_factory, seed, scale):
    folder = tmp_path_factory.mktemp("scaled")
    generator = np.random.default_rng(seed)
    p, r = generator.normal(size=(2, 4, 30)).cumsum(1)
    first = analysed(dense_walk(folder / "p", p), dense_walk(folder / "r", r))
    second = analysed(dense_walk(folder / "q", scale * p), dense_walk(folder / "s", r + generator.normal(size=30)))
    for name, views in first["metrics"].items():
        if not name.endswith("_norm"):
            found, wanted = second["metrics"][name]["product"], views["product"]
            np.testing.assert_allclose(np.array(found, float), np.array(wanted, float), rtol=1e-6, atol=1e-6)


def test_procrustes_of_points_is_that_of_their_gram_matrices():
    points = np.random.default_rng(0).normal(size=(2, 3, 6, 9)).cumsum(2)
    points[0, 2] = 1.0  # does not move
    found = disparity_of_points(*points)
    np.testing.assert_allclose(found, procrustes_disparity(*(points @ np.swapaxes(points, -1, -2))))
    assert np.isnan(found).tolist() == [False, False, True]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 70), st.integers(0, 1000), st.sampled_from([0.1, 1.0, None]), st.floats(1e-150, 1e100))
def test_distance_correlation_is_its_definition(size, seed, grid, scale):
    """Also where numbers repeat, which have no order."""
    a, b = np.random.default_rng(seed).normal(size=(2, size))
    b += 5
    b[: size // 2] += a[: size // 2]
    if grid is not None:
        a, b = np.round(a / grid) * grid, np.round(b / grid) * grid
    wanted = defined_dcor(a, b) if np.ptp(a) and np.ptp(b) else np.nan
    found = distance_correlation(a * scale, b)
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6, nan_ok=True)
    assert not found > 1


def test_distance_correlation_is_never_above_1():
    generator = np.random.default_rng(0)
    for a in generator.normal(size=(30, 10)):
        assert 1 - 1e-9 < distance_correlation(a, 3 - 2 * a) <= 1
    assert np.isnan(distance_correlation(np.ones(3), generator.normal(size=3)))


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 100_000])
def test_distance_correlation_of_many_points(size):
    a = np.random.default_rng(0).normal(size=size)
    assert distance_correlation(a, 3 - 2 * a) == pytest.approx(1, abs=1e-9)
    b = np.random.default_rng(1).normal(size=size)
    assert 0 < distance_correlation(a, b) < 5 / size**0.5
    assert distance_correlation(a, a + b) == pytest.approx(0.67, abs=0.02)
