"""Directions drawn once for all that a step does with them, where drawing waits for many small kernels: on a GPU.

A step reads z at theta + eps z, at theta - eps z and for its update. z is a function of (name, seed, step), so whether it
is drawn again or kept changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zopro.zo.directions import Directions
from zopro.zo.directions.there import waits
from zopro.zo.fused import fuses

KEPT = 2**26  # elements of fp32, 256 MiB; what is beyond is drawn again, as a whole model's would be


class Drawn:
    """What was drawn for the latest step."""

    def __init__(self) -> None:
        self._of: tuple[Directions, int] | None = None
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._all: dict[tuple[tuple[str, ...], int], list[Tensor]] = {}
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

    def tensors(
        self, directions: Directions, named: Sequence[tuple[str, Tensor]], seed: int, step: int
    ) -> list[Tensor] | None:
        """Those of all tensors by `Directions.tensors`, not to be changed; None where they are drawn one by one.

        They are a function of all that is drawn at once, by rounding: a step and its replay ask for the same.
        """
        size = sum(like.numel() for _, like in named)
        if size > KEPT or not directions.pure or not fuses([like for _, like in named]):
            return None
        if self._of != (directions, step):
            self.forget()
            self._of = directions, step
        key = tuple(name for name, _ in named), seed
        found = self._all.get(key)
        if found is None:
            found = directions.tensors(named, seed, step)
            if size <= self._room:
                self._all[key] = found
                self._room -= size
        return found

    def forget(self) -> None:
        """When a step is done."""
        self._kept.clear()
        self._all.clear()
        self._room = KEPT
