"""Two measures that are no cosine: Procrustes disparity of trajectories, and distance correlation of updates."""

from __future__ import annotations

import numpy as np

MAX_EXACT = 1e-14  # relative: below this a trajectory's spread is rounding


def centred(gram: np.ndarray) -> np.ndarray:
    """[..., T, T] inner products of points -> of the points minus their mean."""
    mean = gram.mean(-1, keepdims=True)
    return gram - mean - np.swapaxes(mean, -1, -2) + gram.mean((-1, -2), keepdims=True)


def procrustes_disparity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What is left between two trajectories after the best translation, rotation, reflection and scaling, in [0, 1].

    With X, Y the trajectories [T, D], centred and scaled to Frobenius norm 1, scipy.spatial.procrustes gives
    1 - (sum of singular values of X^T Y)^2 (Gower 1975; Schonemann 1966). Those singular values are the square roots of
    the eigenvalues of X X^T Y Y^T, so the T x T Gram matrices say all of it: with F F^T = X X^T and H H^T = Y Y^T they
    are the singular values of F^T H.

    Args:
        first, second: Gram matrices [..., T, T] of the two trajectories, centred or not.

    Returns:
        [...]; NaN where a trajectory does not move.
    """
    trajectories = []
    for gram in (first, second):
        values, vectors = np.linalg.eigh(centred(gram))
        values = np.maximum(values, 0)
        moves = values.sum(-1) > MAX_EXACT * np.abs(np.einsum("...tt->...t", gram)).max(-1)
        trajectories.append(vectors * np.sqrt(np.where(moves[..., None], values, 0.0))[..., None, :])
    return disparity_of_points(trajectories[0], trajectories[1])


def disparity_of_points(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`procrustes_disparity` of trajectories given as points [..., T, D], not as their Gram matrices."""
    roots = []
    moves = np.asarray(True)
    for points in (first, second):
        about_mean = points - points.mean(-2, keepdims=True)
        norm = np.linalg.norm(about_mean, axis=(-2, -1), keepdims=True)
        moves = moves & (norm[..., 0, 0] > 0)
        roots.append(about_mean / np.where(norm > 0, norm, 1.0))
    nuclear = np.linalg.svd(np.swapaxes(roots[0], -1, -2) @ roots[1], compute_uv=False).sum(-1)
    return np.where(moves, np.clip(1 - nuclear**2, 0, 1), np.nan)


def distance_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Distance correlation of paired coordinates (a_k, b_k), k = 1 ... D: 0 only if they are independent.

    dCor = dCov(a, b) / sqrt(dCov(a, a) dCov(b, b)), where dCov^2 is the mean product of the doubly centred matrices of
    absolute differences (Szekely, Rizzo and Bakirov 2007); by `dcor`'s O(D log D) method for univariate samples
    (Huo and Szekely 2016). Of D independent pairs the estimate is about 1.5 / sqrt(D), not 0: see its chance level.
    """
    if a.size < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    import dcor  # seconds to import: only where it is needed

    # Scaled first: the metric is scale free, and updates are small enough for squares of squares to vanish.
    value = dcor.distance_correlation(a / np.abs(a).max(), b / np.abs(b).max(), method="mergesort")
    return float(value)


def compile_distance_correlation() -> None:
    """Have the first distance correlation's compilation, some ten seconds, behind; most of it leaves others the GIL."""
    distance_correlation(np.arange(4.0), np.arange(4.0) ** 2)


def random_walks(lengths: np.ndarray, dimension: int, samples: int, generator: np.random.Generator) -> np.ndarray:
    """[samples, T, T - 1] walks with steps of these lengths in uniformly random directions, seen in their own span.

    Directions of D-dimensional Gaussian vectors; only their inner products are drawn, by Bartlett's decomposition of
    the Wishart distribution (Bartlett 1933): L L^T with chi variables on L's diagonal and normal ones under it.
    """
    steps = len(lengths)
    lower = np.tril(generator.standard_normal((samples, steps, steps)), -1)
    freedom = np.maximum(dimension - np.arange(steps), 0)
    index = np.arange(steps)
    lower[:, index, index] = np.sqrt(generator.chisquare(np.maximum(freedom, 1e-9), (samples, steps))) * (freedom > 0)
    if dimension < steps:
        lower[:, :, dimension:] = 0
    lower *= (lengths / np.linalg.norm(lower, axis=2))[:, :, None]
    return np.concatenate([np.zeros((samples, 1, steps)), np.cumsum(lower, 1)], 1)
