"""Directions drawn once for all that a step does with them, where drawing waits for many small kernels: on a GPU.

A step reads z at theta + eps z, at theta - eps z and for its update. z is a function of (name, seed, step), so whether it
is drawn again or kept changes no bit.
"""

from __future__ import annotations

from torch import Tensor

from zopro.zo.directions import Directions
from zopro.zo.directions.there import waits

KEPT = 2**26  # elements of fp32, 256 MiB; what is beyond is drawn again, as a whole model's would be


class Drawn:
    """What was drawn for the latest step."""

    def __init__(self) -> None:
        self._of: tuple[Directions, int] | None = None
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._room = KEPT

    def tensor(self, directions: Directions, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        """As `Directions.tensor`, a new tensor each time."""
        if not waits(like.device) or not directions.pure:
            return directions.tensor(name, like, seed, step)
        if self._of != (directions, step):
            self.forget()
            self._of = directions, step
        kept = self._kept.get((name, seed))
        if kept is None:
            kept = directions.tensor(name, like, seed, step)
            if kept.numel() > self._room:
                return kept
            self._kept[name, seed] = kept
            self._room -= kept.numel()
        return kept.clone()

    def forget(self) -> None:
        """When a step is done."""
        self._kept.clear()
        self._room = KEPT
