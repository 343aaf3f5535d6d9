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
    absolute differences (Szekely, Rizzo and Bakirov 2007), in O(D log D) (Huo and Szekely 2016). Of D independent
    pairs the estimate is about 1.5 / sqrt(D), not 0: see its chance level.

    Args:
        a, b: [D] each.

    Returns:
        In [0, 1]; NaN with fewer than two pairs, where one of the two is constant, or of numbers that are not finite.
    """
    if a.size < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    # Scaled first: the metric is scale free, and updates are small enough for squares of squares to vanish.
    a, b = (each / np.abs(each).max() for each in (a, b))
    a, b = a - a.mean(), b - b.mean()
    far_a, far_b = _mean_distances(a), _mean_distances(b)
    both = _distance_covariance(_mean_distance_product(a, b), far_a, far_b)
    first, second = (_distance_covariance(2 * each.var(), far, far) for each, far in ((a, far_a), (b, far_b)))
    return float(np.minimum(1.0, np.sqrt(max(both, 0.0) / np.sqrt(first * second))))  # rounding may exceed 1


def _distance_covariance(product: float, far_a: np.ndarray, far_b: np.ndarray) -> float:
    """dCov^2 from the mean of |a_k - a_l| |b_k - b_l| over all k, l, and every number's mean distance [D] from all."""
    return float(product - 2 * np.mean(far_a * far_b) + far_a.mean() * far_b.mean())


def _mean_distances(points: np.ndarray) -> np.ndarray:
    """[D] -> [D] mean absolute differences of each number from all."""
    order = np.argsort(points)
    ascending, size = points[order], points.size
    below = np.cumsum(ascending)
    found = np.empty(size)
    found[order] = ((2 * np.arange(1, size + 1) - size) * ascending - 2 * below + below[-1]) / size
    return found


def _mean_distance_product(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over all k, l of |a_k - a_l| |b_k - b_l|, for a and b [D] of mean 0, in O(D log D).

    Over pairs with a_k <= a_l the product is (a_l - a_k)(b_l - b_k), or minus that where b_k > b_l. So the sum over all
    k, l is 4 times that of (a_l - a_k)(b_l - b_k) over the pairs in the same order in both, less 2 D a.b. Those pairs are
    found as a merge sort meets them: with the numbers sorted by a, each pair lies once in the two halves of one block of
    2^m, and in a block that is sorted by b what a number of the right half needs of the left one is a running sum.
    """
    ascending = np.argsort(a)
    a, b = a[ascending], b[ascending]
    order = np.argsort(b).astype(np.uint16 if a.size <= 2**16 else np.int64)  # numpy sorts 16 bits by their digits
    terms = np.stack([np.ones_like(a), a, b, a * b])
    found = 0.0
    for level in reversed(range((a.size - 1).bit_length())):  # order: block by block of 2^(level + 1), by b within
        is_right = (order >> level & 1).astype(bool)
        ordered, right = terms.take(order, axis=1), np.flatnonzero(is_right)
        running = np.cumsum(np.where(is_right, 0.0, ordered), axis=1)
        before_block = np.zeros((4, -(-a.size // (2 << level))))
        before_block[:, 1:] = running[:, np.arange(2 << level, a.size, 2 << level) - 1]
        left = running.take(right, axis=1) - before_block.take(order[right] >> (level + 1), axis=1)
        one, a_right, b_right, ab_right = ordered.take(right, axis=1)
        found += left[0] @ ab_right - left[1] @ b_right - left[2] @ a_right + left[3] @ one
        order = order[np.argsort(order >> level, kind="stable")]
    return float(4 * found / a.size**2 - 2 * np.mean(a * b))


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
