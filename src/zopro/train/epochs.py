"""The order in which a trainer goes through its rows, also when it is resumed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class EpochSampler(Sampler):
    """TRL's sampler with an order for each epoch: a resumed run goes on in the order of the uninterrupted one."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed = sampler, seed

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, by `CountedSteps`. accelerate does not reach the sampler of an epoch that several
        processes resume within."""
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class CountedSteps(TrainerCallback):
    """Begins TRL's counter of micro-batches where a training begins, and the order of rows where an epoch does:
    transformers' checkpoints have neither.

    By the counter a trainer knows which part of the rows that are answered at once comes next. Answers, and the time of a
    step, that a training before has left are dropped: this one may begin at another step.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        try:
            batches = len(train_dataloader)
        except TypeError:  # a stream has no epochs that are known to end
            batches = 0
        self.trainer._step = micro_batches(state.global_step, batches, args.gradient_accumulation_steps)
        self.trainer._buffered_inputs, self.trainer._current_train_step_time = None, 0.0
        self.trainer.row_seeds.begin("train")
        answered = args.steps_per_generation * args.num_iterations
        shared = getattr(self.trainer, "asks_logprobs", True)  # do answers serve several steps
        if self.trainer._step % answered and shared and state.is_world_process_zero:
            logger.warning(
                "resumed between steps on the same answers, which a checkpoint does not have: new ones are drawn, and "
                "training goes on otherwise than without the stop. From a step that is a multiple of %d it goes on to "
                "the same bits: set save_steps so",
                math.lcm(answered, args.gradient_accumulation_steps) // args.gradient_accumulation_steps,
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.order is not None:  # a stream has none
            self.trainer.order.set_epoch(int((state.epoch or 0) + 1e-6))


def micro_batches(steps: int, batches: int, accumulated: int) -> int:
    """Micro-batches of so many steps, where an epoch has so many `batches` (0: no end) and its last step may have fewer.

    >>> micro_batches(3, batches=4, accumulated=3), micro_batches(3, batches=0, accumulated=3)
    (7, 9)
    """
    if not batches:
        return steps * accumulated
    epochs, rest = divmod(steps, -(-batches // accumulated))
    return epochs * batches + rest * accumulated
