"""Gaussian noise: SPSA as in MeZO."""

from __future__ import annotations

import torch  # noqa: F401  (doctest)
from torch import Tensor

from zopro.zo.directions.base import Directions, gaussian


class Gaussian(Directions):
    """z ~ N(0, I): SPSA as in MeZO (Malladi et al. 2023, arXiv 2305.17333).

    >>> round(float(Gaussian().sample([("w", torch.zeros(100, 100))], seed=0, step=3)["w"].std()), 1)
    1.0
    """

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        return gaussian(name, like, seed, step)
