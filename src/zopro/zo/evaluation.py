"""Evaluations of one closure around theta that can be compared: the same random state, no stale casts of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from zopro.zo.perturbation import Offset, Perturbation
from zopro.zo.ranks import Ranks

Closure = Callable[[], Any]  # () -> scalar loss, a tensor or a float


class Evaluator:
    """Losses of `closure` at displaced parameters, all under the random state that the caller had at construction.

    Dropout so draws the same mask at theta + t z and theta - t z. The state is only ever put back to what the caller
    had, never reseeded: after an evaluation it is where one call of the closure leaves it.

    Attributes:
        watch: in place of a plain call of the closure, if it is given (`zopro.zo.reads`).
    """

    def __init__(self, closure: Closure, perturbation: Perturbation, ranks: Ranks | None = None) -> None:
        self.closure = closure
        self.perturbation = perturbation
        self.ranks = ranks
        self.watch: Callable[[Closure], Any] | None = None
        self._cpu = torch.get_rng_state()
        devices = {tensor.device for tensor in perturbation.parameters if tensor.device.type == "cuda"}
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def at(self, offset: Offset | None) -> float:
        """The loss of this rank at theta + offset, at theta for None."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        torch.clear_autocast_cache()  # an autocast around the step would hand out casts made before the perturbation
        try:
            if offset is None:
                return self._loss()
            with self.perturbation.at(offset):
                return self._loss()
        finally:
            torch.clear_autocast_cache()

    def _loss(self) -> float:
        return float(self.closure() if self.watch is None else self.watch(self.closure))

    def losses(self, offsets: Sequence[Offset | None]) -> list[float]:
        """The losses at theta + each offset: of all ranks, in one exchange."""
        if self.ranks is None:
            return [self.at(offset) for offset in offsets]
        return self.ranks.losses(lambda index: self.at(offsets[index]), len(offsets))

    def any_rank(self, bits: int, count: int) -> int:
        """The `count` bits that are set on any rank."""
        return bits if self.ranks is None else self.ranks.any(bits, count)
