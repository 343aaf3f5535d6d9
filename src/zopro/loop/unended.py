"""Answers that do not end within max_completion_length: said once where they are more than a tenth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

TOLERATED = 0.1
ENOUGH = 64
"""Answers after which a training says what it has seen so far."""
CLIPPED = "completions/clipped_ratio"
"""TRL's name for the share of a step's answers that do not end."""
ANSWERS = "answers"
"""All answers so far, where a trainer draws others than so many a step: those of a population."""


def unended(where: str, share: float, count: int, limit: int) -> str | None:
    """The line about a share of `count` answers that do not end; None where they are few.

    >>> unended("evaluation", 0.25, 200, 48)
    'evaluation: 50 of 200 sampled answers (25 %) do not end within max_completion_length: 48. Raise it, ...
    >>> unended("evaluation", 0.1, 200, 48)
    """
    if share <= TOLERATED:
        return None
    return (
        f"{where}: {round(share * count)} of {count} sampled answers ({100 * share:.0f} %) do not end within "
        f"max_completion_length: {limit}. Raise it, or ask for shorter answers: they are scored as they are cut off."
    )


class UnendedCallback(TrainerCallback):
    """Says so while a policy is trained, from what TRL's trainers log of each step.

    Args:
        say: takes the line.
        where: what its line begins with.
        answers: of one step, where the trainer does not log `ANSWERS`.
        limit: max_completion_length.
    """

    def __init__(self, say: Callable[[str], None], where: str, answers: int, limit: int) -> None:
        self.say, self.where, self.answers, self.limit = say, where, answers, limit
        self.steps, self.total, self.count, self.said = 0, 0.0, 0, False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        share = (logs or {}).get(CLIPPED)
        if isinstance(share, int | float) and math.isfinite(share):
            self.steps, self.total = self.steps + 1, self.total + share
            self.count = int((logs or {}).get(ANSWERS, self.steps * self.answers))
            self._judge(self.count >= ENOUGH)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._judge(self.steps > 0)

    def _judge(self, enough: bool) -> None:
        if enough and not self.said:
            line = unended(self.where, self.total / self.steps, self.count, self.limit)
            self.said = line is not None
            if line:
                self.say(line)
