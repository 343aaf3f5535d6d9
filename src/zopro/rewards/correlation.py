"""How well rewards follow scores."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(left: Tensor, right: Tensor) -> float:
    """Correlation of two vectors [n]; NaN where one is constant."""
    return float(torch.corrcoef(torch.stack([left, right]))[0, 1])


def spearman(left: Tensor, right: Tensor) -> float:
    """Correlation of the ranks of two vectors [n]; equal values share the mean of their ranks."""
    return pearson(_ranks(left), _ranks(right))


def _ranks(values: Tensor) -> Tensor:
    _, group, sizes = values.unique(return_inverse=True, return_counts=True)
    return (sizes.cumsum(0).double() - (sizes - 1) / 2)[group]
