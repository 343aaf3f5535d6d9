"""A step's evaluations of the loss, counted as they are made: first those by which eps is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from zopro.system import progress


@contextmanager
def counting(spsa: Any) -> Iterator[Callable[[int], None]]:
    """Inside, what is given is told how many evaluations have been made since."""
    title = "calibrating eps" if spsa.strategy.uncalibrated else "differences"
    with progress.task(title, unit="evaluations") as seen:
        yield lambda count: seen.step(seen.done + count)
