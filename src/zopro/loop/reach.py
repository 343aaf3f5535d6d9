"""How far a policy's steps will take it: said after the first of them where the learning rate is too low to matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from zopro.loop.improvement import HARDLY
from zopro.train.step_kl import STEP_KL

ENOUGH = 3
"""Steps after which the rest is foreseen."""


def too_short(where: str, rate: str, value: float, steps: int, step_kl: float, follows: bool = False) -> str | None:
    """The line about a learning rate whose steps leave the policy as it is; None where they do not.

    Args:
        where: what the line begins with.
        rate, value: the key of the learning rate, and what it is.
        steps: of the whole iteration.
        step_kl: of one of them, in nats an answer.
        follows: the steps go along one update and add up, so that their KL grows with the square of their number.

    >>> too_short("policy 0", "learning_rate", 1e-4, 60, 4e-6)
    'policy 0: 60 steps at learning_rate: 0.0001 make a KL of about 0.0002 nats an answer, too little to change o...
    >>> too_short("policy 0", "learning_rate", 1e-2, 60, 4e-2)
    """
    reached = step_kl * steps ** (2 if follows else 1)
    if not 0 < reached < HARDLY:
        return None
    return (
        f"{where}: {steps} steps at {rate}: {value:g} make a KL of about {reached:.1g} nats an answer, too little "
        f"to change one. At {value / math.sqrt(reached):.1g} they make about 1."
    )


class ReachCallback(TrainerCallback):
    """Says so while a policy is trained. `say` takes the line; the rest as `too_short` has it."""

    def __init__(self, say: Callable[[str], None], where: str, rate: str, value: float, follows: bool) -> None:
        self.say, self.where, self.rate, self.value, self.follows = say, where, rate, value, follows
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or STEP_KL not in logs or len(self.seen) == ENOUGH:
            return
        self.seen.append(logs[STEP_KL])
        if len(self.seen) == ENOUGH:
            mean = sum(self.seen) / ENOUGH
            line = too_short(self.where, self.rate, self.value, state.max_steps, mean, self.follows)
            if line:
                self.say(line)
