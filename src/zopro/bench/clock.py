"""Seconds by what was being done, on a device that may be busy after a call returns."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Watch:
    """Seconds by name (`zopro.system.clock.Clock`); a CUDA device is waited for at both ends of a span.

    What happens in a span inside another counts as "outer/inner", and not as the outer one's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start, outer = self.now(), "/".join(self._open)
        self._open.append(name)
        try:
            yield
        finally:
            seconds = self.now() - start
            self.seconds["/".join(self._open)] += seconds
            self._open.pop()
            if outer:
                self.seconds[outer] -= seconds

    def take(self) -> dict[str, float]:
        """The seconds since the last time."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken
