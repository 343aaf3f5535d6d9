"""Targeted directions of many tensors at once: those of one size are rows of a matrix, and what a row needs is a column.

The formulas are those of `zopro.zo.directions.targeted`, where each tensor is taken by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zopro.zo.directions import there


class Rows:
    """The tensors of one size n, on one device; R of them.

    Args:
        names: of the tensors.
        size: n.
        device: of them all.
        previous, reward: mu and v by name; a tensor may lack either.
        mu_norms, v_norms: of those that are not 0.
        alone: the norm of z for a tensor without mu; None: noise keeps its own.
        least: of a norm, under which noise is but rounding.
    """

    def __init__(
        self,
        names: Sequence[str],
        size: int,
        device: torch.device,
        previous: Mapping[str, Tensor],
        reward: Mapping[str, Tensor],
        mu_norms: Mapping[str, float],
        v_norms: Mapping[str, float],
        alone: float | None,
        least: float,
    ) -> None:
        def matrix(update: Mapping[str, Tensor], norms: Mapping[str, float]) -> Tensor:
            rows = [
                update[name].to(device=device, dtype=torch.float32).flatten()
                if name in norms
                else torch.zeros(size, device=device)
                for name in names
            ]
            return torch.stack(rows)

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        self.size, self.least = size, least
        self.mu = matrix(previous, mu_norms)  # (R, n), 0 where there is none
        self.unit = matrix(reward, v_norms) / column([v_norms.get(name, 1.0) for name in names])
        self.has_mu = column([name in mu_norms for name in names]).bool()  # (R, 1)
        self.has_v = column([name in v_norms for name in names]).bool()
        self.keeps = column([name not in mu_norms and alone is None for name in names]).bool()
        self.wanted = column([mu_norms.get(name, alone or 0.0) for name in names], there.widest(device))

    def directions(self, noise: Tensor, d: float, scale: float) -> Tensor:
        """z (R, n) of noise (R, n), which is overwritten."""
        for _ in range(2):
            noise.sub_(self.unit * (self.unit * noise).sum(1, keepdim=True))
        if self.size == 1:
            noise.masked_fill_(self.has_v, 0.0)
        largest = noise.abs().amax(1, keepdim=True)
        norm = largest.to(self.wanted.dtype) * torch.linalg.vector_norm(noise / largest, dim=1, keepdim=True)
        nothing = ~(norm > self.least) & ~self.keeps
        factor = torch.where(self.keeps, 1.0, self.wanted / norm).float()
        noise.mul_(factor).masked_fill_(nothing, 0.0)
        noise.mul_(torch.where(self.has_mu, math.sqrt(1 - d * d), 1.0)).add_(self.mu, alpha=d)
        return noise.mul_(torch.where(self.has_mu, scale, 1.0))
