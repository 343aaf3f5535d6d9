"""The displacements t eps z of the tensors that one step moves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from zopro.zo.directions import Directions
from zopro.zo.groups import Entry
from zopro.zo.perturbation import Offset


class Displacements:
    """Of one step's directions. Offsets (`at`) are by the index of a tensor in `tensors`."""

    def __init__(self, entries: Sequence[Entry], directions: Directions, step: int) -> None:
        self.entries, self.directions, self.step = entries, directions, step
        self.tensors = [tensor for _, tensor, _ in entries]

    def at(self, seed: int, t: float, eps: float | None = None) -> Offset:
        """t eps z along the direction of `seed`, with `eps` in place of each group's own if it is given."""

        def offset(index: int) -> Tensor:
            name, tensor, group = self.entries[index]
            z = self.directions.tensor(name, tensor, seed, self.step)
            return z.mul_(t * (group["eps"] if eps is None else eps))

        return offset

    def scale(self, seed: int) -> float:
        """Root mean square of the direction's entries; 1 for a direction of 0."""
        unit = self.at(seed, 1.0, eps=1.0)
        square = sum(float(unit(index).square().sum()) for index in range(len(self.tensors)))
        return math.sqrt(square / max(1, sum(tensor.numel() for tensor in self.tensors))) or 1.0
