"""Projections: PCA equal to a singular value decomposition; every method from three points up, and by its seed."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from zopro.analysis.numbers.projection import PACKAGES, available, distance_matrix, extrapolations, pca, project

NOTHING = np.zeros((0, 5))


def test_pca_is_the_singular_value_decomposition():
    points = np.random.default_rng(0).normal(size=(6, 40))
    others = extrapolations([0, 1, 2], 6)
    centred = points - points.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    wanted = np.concatenate([centred, others @ points - points.mean(0)]) @ axes[:3].T
    found, share = pca(points @ points.T, others, 3)
    np.testing.assert_allclose(np.abs(found), np.abs(wanted), atol=1e-9)
    np.testing.assert_allclose(share, sizes[:3] ** 2 / (sizes**2).sum())
    np.testing.assert_allclose(share.sum(), 1 - (sizes[3:] ** 2).sum() / (sizes**2).sum())


def test_extrapolation_repeats_the_last_step():
    line = np.array([[0.0], [1.0], [3.0]])
    np.testing.assert_array_equal(extrapolations([0, 1, 2], 3) @ line, [[2.0], [5.0]])


def test_a_straight_line_stays_straight():
    line = np.outer(np.arange(5.0), np.ones(9))
    found, share = pca(line @ line.T, NOTHING, 3)
    np.testing.assert_allclose(np.diff(found[:, 0]) * np.sign(found[-1, 0]), 3)
    np.testing.assert_allclose(found[:, 1:], 0, atol=1e-9)
    np.testing.assert_allclose(share, [1, 0, 0], atol=1e-12)


def test_points_that_are_all_equal_stay_where_they_are():
    found, share = pca(np.ones((5, 5)), NOTHING, 2)
    assert not found.any() and not share.any()
    for method in available():
        assert not project(method, np.ones((5, 5)), NOTHING, 2).any()


@pytest.mark.parametrize("method", ["tsne", "umap"])
def test_three_points_have_no_neighbourhoods(method):
    """t-SNE drew two policies and the last step repeated on one spot."""
    pytest.importorskip(PACKAGES[method])
    points = np.random.default_rng(0).normal(size=(2, 8))
    gram, others = points @ points.T, extrapolations([0, 1], 2)
    np.testing.assert_array_equal(project(method, gram, others, 2), pca(gram, others, 2)[0])


def test_distances_are_exact():
    points = np.random.default_rng(0).normal(size=(5, 8))
    wanted = np.linalg.norm(points[:, None] - points, axis=-1)
    np.testing.assert_allclose(distance_matrix(points @ points.T), wanted, atol=1e-9)


@pytest.fixture
def few_epochs(monkeypatch):
    """UMAP's cost, of some hundred, is seconds each time."""
    umap = pytest.importorskip("umap")
    monkeypatch.setattr(umap, "UMAP", partial(umap.UMAP, n_epochs=30))


@pytest.mark.usefixtures("few_epochs")
@pytest.mark.parametrize("method", PACKAGES)
@pytest.mark.parametrize(("dimensions", "count"), [(2, 3), (3, 3), (2, 4), (3, 20)])
def test_every_method_works_from_three_points_up(method, dimensions, count):
    pytest.importorskip(PACKAGES[method])
    points = np.random.default_rng(0).normal(size=(count, 50)).cumsum(0)
    points[1] = points[0]  # both trajectories start at the origin
    gram = points @ points.T
    others = extrapolations([0, 1, 2], count)
    first, again = (project(method, gram, others, dimensions, seed=3) for _ in range(2))
    assert first.shape == (count + 2, dimensions)
    assert np.isfinite(first).all() and np.ptp(first[:, 0]) > 0
    np.testing.assert_array_equal(first, again)


@pytest.mark.usefixtures("few_epochs")
@pytest.mark.parametrize("method", ["tsne", "umap"])
def test_neighbours_stay_neighbours(method):
    pytest.importorskip(PACKAGES[method])
    points = np.random.default_rng(0).normal(size=(30, 20))
    points[15:] += 50
    placed = project(method, points @ points.T, np.zeros((0, 30)), 2)
    gap = np.linalg.norm(placed[:15].mean(0) - placed[15:].mean(0))
    assert gap > 2 * max(np.linalg.norm(half - half.mean(0), axis=1).mean() for half in (placed[:15], placed[15:]))
