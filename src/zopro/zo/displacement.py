"""A displaced policy by name: a few numbers from which anyone who holds theta forms theta + t eps z, and no tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from zopro.zo.directions import tensor_generator


@dataclasses.dataclass(frozen=True)
class Displacement:
    """theta + t eps z(seed, query, step); t = 0 names theta itself, whose tensors are then read as they are.

    >>> plus = Displacement(seed=3, query=0, step=7, t=1.0, eps=(1e-3,))
    >>> plus.mirrored.t, plus.direction_seed
    (-1.0, 3)
    """

    seed: int  # of the run or the step
    query: int  # which of a step's directions
    step: int
    t: float
    eps: tuple[float, ...] = (1.0,)  # of each parameter group

    @property
    def direction_seed(self) -> int:
        """What `Directions.tensor` takes as its seed."""
        return query_seed(self.query, self.seed)

    @property
    def mirrored(self) -> Displacement:
        """The other side: theta - t eps z."""
        return dataclasses.replace(self, t=-self.t)


Values = Callable[[Sequence[Displacement]], list[float]]  # losses, all of a step's in one call


def query_seed(query: int, seed: int) -> int:
    """Seed of the directions of a step's `query`-th query: `seed` itself for the first."""
    return seed if query == 0 else tensor_generator("query", seed, query, torch.device("cpu")).initial_seed()
