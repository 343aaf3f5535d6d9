"""Answers of a training to which no reward gives a number (None): counted and said, at doubling intervals.

with unscored("policy 0", say) as count:
    ...
    count([1.0, math.nan])      # "policy 0: 1 of 2 answers have no reward (None): they take no part in their step."
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from trl.trainer import rloo_trainer

TRL_S = "All reward functions returned None"
"""How TRL's warning of one of them begins, with all columns of its row, at every step that has any."""


class Unscored:
    """Counts answers, and those without a reward; says so at the 1st, 2nd, 4th, 8th, ... call that has any."""

    def __init__(self, where: str, say: Callable[[str], None]) -> None:
        self.where, self.say = where, say
        self.answers = self.missing = self.calls = 0

    def __call__(self, rewards: Sequence[float]) -> None:
        missing = sum(map(math.isnan, rewards))
        self.answers, self.missing = self.answers + len(rewards), self.missing + missing
        if not missing:
            return
        self.calls += 1
        if self.calls & (self.calls - 1) == 0:
            found = f"{self.missing} of {self.answers} answers have no reward (None)"
            self.say(f"{self.where}: {found}: they take no part in their step.")


@contextmanager
def unscored(where: str, say: Callable[[str], None]) -> Iterator[Unscored]:
    """Inside, TRL's own warnings of such answers are not shown."""
    logger = logging.getLogger(rloo_trainer.__name__)
    logger.addFilter(_not_trl_s)
    try:
        yield Unscored(where, say)
    finally:
        logger.removeFilter(_not_trl_s)


def _not_trl_s(record: logging.LogRecord) -> bool:
    return TRL_S not in record.getMessage()
