"""How far a policy may go from the SFT policy: `max_kl`, looked at after every step of a policy iteration.

The KL is that of a step's own answers, in nats an answer. They were drawn before the step was taken, so the policy that
is kept is one step further. A stopped iteration is whole: its journal has the steps that were taken, and what follows
goes on from there. It is a function of the step alone, so an iteration that is resumed stops where it would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from zopro.store import shown
from zopro.train.callbacks import kl_of_answers


class BoundCallback(TrainerCallback):
    """Ends a training at the first step whose answers are too far away.

    Args:
        bound: in nats an answer.
        say: takes one line.
        where: what it begins with.
        rate: the key of the learning rate.
        start: what KL is to, as `zopro.store.shown.start` names it.
    """

    def __init__(self, bound: float, say: Callable[[str], None], where: str, rate: str, start: str) -> None:
        self.bound, self.say, self.where, self.rate, self.start = bound, say, where, rate, start
        self.told = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "train_runtime" in logs:
            return
        kl = kl_of_answers(logs)
        if kl is None:
            self._tell(f"{self.where}: its steps measure no KL, so max_kl is looked at when it is evaluated")
        elif not kl <= self.bound and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_save = False  # no checkpoint to go on from: done again, this step stops again
            self.say(
                f"{self.where}: stopped after step {state.global_step} of {state.max_steps}: its answers are "
                f"{shown.kl(kl)} nats from {self.start}, above max_kl: {self.bound:g}. Lower {self.rate}, or raise "
                "beta or max_kl."
            )

    def _tell(self, line: str) -> None:
        if not self.told:
            self.told = True
            self.say(line)


def beyond(line: Mapping[str, Any], bound: float, where: str, start: str) -> str | None:
    """The line about an evaluation whose policy is further than `bound` from `start`; None where it is not.

    >>> beyond({"kl_per_answer": 3.5}, 10.0, "es", "SFT"), beyond({"kl_per_answer": 3.5}, 0.0, "es", "SFT")
    (None, None)
    >>> beyond({"kl_per_answer": 13.5}, 10.0, "evaluation 0", "the start")
    'evaluation 0: the policy is 13.50 nats an answer from the start, above max_kl: 10'
    """
    kl = line[shown.PER_ANSWER]
    if not bound or (isinstance(kl, float) and math.isfinite(kl) and kl <= bound):
        return None
    return f"{where}: the policy is {shown.kl(kl)} nats an answer from {start}, above max_kl: {bound:g}"
