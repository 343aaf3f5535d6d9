"""Verifiable problems made on the spot, offline: the same seed gives the same rows on every machine.

    zopro data arithmetic --rows 2000 --out train.jsonl
    zopro data arithmetic --rows 300 --split test --out test.jsonl

Which split a problem is in is a property of the problem, not of the seed: rows of `test` never stand in `train`, whatever
the seeds and the numbers of rows. A further kind is a module here and a row of `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zopro.tasks.generated.arithmetic import arithmetic
from zopro.tasks.generated.countdown import countdown

__all__ = ["KINDS", "arithmetic", "countdown"]

KINDS: dict[str, Callable[..., list[dict[str, Any]]]] = {"countdown": countdown, "arithmetic": arithmetic}
