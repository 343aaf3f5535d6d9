"""Noise of low rank: few draws for a large matrix."""

from __future__ import annotations

import math

import torch  # noqa: F401  (doctest)
from torch import Tensor

from zopro.zo.directions.base import Directions, gaussian


class LowRank(Directions):
    """z = A B^T / sqrt(r) for a matrix (m, n), with A (m, r), B (n, r) ~ N(0, I): E[z z^T] = I from r (m + n) draws.

    The cheapest choice where noise is drawn for every parameter of a model (LOZO, Chen et al. 2024, arXiv 2410.07698).
    Tensors of more dimensions are matrices of their first dimension; vectors, which have no rank, take N(0, I).

    Args:
        rank: r. Entries have kurtosis 3 + 6 / r: the larger, the nearer to Gaussian noise.

    Raises:
        ValueError: rank < 1.

    >>> int(torch.linalg.matrix_rank(LowRank(rank=2).sample([("w", torch.zeros(8, 6))], seed=0, step=3)["w"]))
    2
    """

    def __init__(self, rank: int = 4) -> None:
        if rank < 1:
            raise ValueError(f"rank: must be at least 1, got {rank}")
        self.rank = rank

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        factors = self.factors(name, like, seed, step)
        if factors is None:
            return gaussian(name, like, seed, step)
        left, right = factors
        return (left @ right.T).view(like.shape)

    def factors(self, name: str, like: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor] | None:
        if like.dim() < 2:
            return None
        rows, columns = len(like), like[0].numel() if len(like) else 0
        drawn = gaussian(name, like.new_empty(rows + columns, self.rank, device=like.device), seed, step)
        return drawn[:rows], drawn[rows:].div_(math.sqrt(self.rank))
