"""A step's evaluations of the loss, counted as they are made: first those by which eps is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from zopro.system import progress


@contextmanager
def counting(spsa: Any) -> Iterator[Callable[[int], None]]:
    """Inside, what is given is told how many evaluations have been made since."""
    once = spsa.strategy.uncalibrated
    with progress.task("calibrating eps" if once else "differences", unit="evaluations", once=once) as seen:
        yield lambda count: seen.step(seen.done + count)
