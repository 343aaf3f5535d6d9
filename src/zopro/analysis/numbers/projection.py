"""Trajectories in two or three dimensions: PCA, t-SNE and UMAP, all from exact inner products.

PCA needs nothing but the Gram matrix (Schoenberg 1935, Torgerson 1952: classical scaling), and is exact. t-SNE (van der
Maaten and Hinton 2008, by `openTSNE`) and UMAP (McInnes et al. 2018, by `umap-learn`) get the exact matrix of distances
and start from the PCA, so that a seed gives one picture. They show neighbourhoods: their lengths and angles mean nothing.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from zopro.analysis.numbers.shape import centred

PACKAGES = {"pca": "numpy", "tsne": "openTSNE", "umap": "umap"}
TITLES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}


def available() -> list[str]:
    """The methods whose package is installed."""
    return [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]


def project(method: str, gram: np.ndarray, others: np.ndarray, dimensions: int, seed: int = 0) -> np.ndarray:
    """Coordinates [n + m, dimensions] of n points and of m others that are combinations of them.

    Args:
        method: pca, tsne or umap.
        gram: [n, n] inner products of the points; n >= 2.
        others: [m, n] coefficients, such as of an extrapolation. They have no say in PCA's axes; the other two methods
            place every point among all.
        dimensions: 2 or 3. Directions the points do not have are zero.
        seed: of t-SNE and UMAP.
    """
    start, _ = pca(gram, others, dimensions)
    if method == "pca" or len(start) < 4 or np.ptp(start) == 0:
        return start
    rows = np.concatenate([np.eye(len(gram)), others])
    distances = distance_matrix(rows @ gram @ rows.T)
    return _METHODS[method](distances, start, seed)


def pca(gram: np.ndarray, others: np.ndarray, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the points, and the share of the variance along each [dimensions]."""
    values, vectors = np.linalg.eigh(centred(gram))
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = values[:dimensions] > 1e-12 * max(values[0], 0.0)
    size = min(dimensions, len(values))
    scale = np.sqrt(np.where(kept, values[:size], 1.0))
    # A sign is arbitrary: what is farthest out lies on the positive side, so that a longer run keeps its picture.
    farthest = np.abs(vectors[:, :size]).argmax(0)
    signs = np.where(vectors[farthest, np.arange(size)] < 0, -1.0, 1.0)
    axes = np.where(kept, vectors[:, :size] * signs / scale, 0.0)  # [n, size] centred points -> coordinates
    mean = gram.mean(0)
    rows = np.concatenate([np.eye(len(gram)), others])
    inner = rows @ gram - mean  # <x, y_j - mean>: the constant of each row vanishes, as every axis sums to zero
    coordinates = np.zeros((len(rows), dimensions))
    coordinates[:, :size] = inner @ (axes - axes.mean(0))
    coordinates -= coordinates[: len(gram)].mean(0)
    share = np.zeros(dimensions)
    share[:size] = np.where(kept, values[:size], 0) / max(np.maximum(values, 0).sum(), 1e-300)
    return coordinates, share


def distance_matrix(gram: np.ndarray) -> np.ndarray:
    """[n, n] Euclidean distances from inner products."""
    squares = np.diagonal(gram)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * gram, 0))
    np.fill_diagonal(distances, 0)
    return (distances + distances.T) / 2


def _tsne(distances: np.ndarray, start: np.ndarray, seed: int) -> np.ndarray:
    from openTSNE import TSNEEmbedding
    from openTSNE.affinity import PerplexityBasedNN

    count = len(distances)
    affinities = PerplexityBasedNN(
        distances,
        perplexity=max(1.0, min(30.0, (count - 1) / 3)),
        metric="precomputed",
        method="exact",
        n_jobs=1,
        random_state=seed,
    )
    small = start / max(start[:, 0].std(), 1e-300) * 1e-4  # as van der Maaten: a start so small that shape is free
    embedding = TSNEEmbedding(small, affinities, negative_gradient_method="bh", n_jobs=1, random_state=seed)
    rate: Any = max(count / 4, 1.0)
    embedding.optimize(250, exaggeration=4, momentum=0.5, learning_rate=rate, inplace=True)
    embedding.optimize(500, momentum=0.8, learning_rate=rate, inplace=True)
    return np.asarray(embedding, dtype=float)


def _umap(distances: np.ndarray, start: np.ndarray, seed: int) -> np.ndarray:
    from umap import UMAP

    scaled = 10 * start / max(np.abs(start).max(), 1e-300)  # umap-learn's own scale of an initial embedding
    scaled += np.random.default_rng(seed).normal(scale=1e-4, size=scaled.shape)  # equal points would never part
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapper = UMAP(
            n_components=start.shape[1],
            n_neighbors=min(15, len(distances) - 1),
            metric="precomputed",
            init=scaled.astype(np.float32),
            random_state=seed,
            n_jobs=1,
        )
        return np.asarray(mapper.fit_transform(distances), dtype=float)


_METHODS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {"tsne": _tsne, "umap": _umap}


def extrapolations(positions: Sequence[int], total: int) -> np.ndarray:
    """[len(positions) - 1, total] coefficients of 2 x_i - x_{i-1}: where each step would lead if it were repeated."""
    rows = np.zeros((max(0, len(positions) - 1), total))
    for row, (before, here) in zip(rows, pairwise(positions), strict=True):
        row[here] += 2
        row[before] -= 1
    return rows
