"""The slope that a trainer's differences take is the one its gradient has, or the trainer says so and stops.

Two things make it so. What the gradient takes as constant is kept at theta (zopro.zo.frozen); a loss that has nothing of
the kind is evaluated as it always was. And at the first step one slope by autograd, on a row or two, is compared with the
difference along the same direction: what a frozen factor cannot fix (a backward pass of its own kind, a straight-through
estimate) is met there.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import TrainingArguments

from zopro.system.heap import expect_graph
from zopro.system.progress import task
from zopro.train.rehearsal import repeatable, stand_in
from zopro.train.slope_check import WHOLE, Slopes, compare, of_all, parts, recorded, trained
from zopro.zo import SPSA
from zopro.zo.evaluation import Closure
from zopro.zo.frozen import Frozen, OtherPath

logger = logging.getLogger(__name__)

Loss = Callable[[Any, Any], Any]  # (trainer, inputs) -> scalar loss
TRIES = 5  # batches: the rows of one may say nothing


class GradientSlope:
    """What a trainer evaluates in place of its loss, so that differences have the slope of its gradient.

    Args:
        trainer: a `zeroth_order` trainer.
        check: whether the first steps compare with autograd.
    """

    def __init__(self, trainer: Any, check: bool = True) -> None:
        self.trainer = trainer
        self.tries = TRIES if check else 0
        self._step = -1  # of the last comparison
        self._freezes: dict[frozenset[str], bool] = {}  # names of a batch's tensors -> whether its loss has such factors
        self._search_at: dict[frozenset[str], int] = {}  # the step at which one without is searched again

    def closure(self, loss: Loss, inputs: Any, search: bool = True) -> Closure:
        """The loss as a function of the parameters alone.

        Args:
            loss: of a trainer on a batch.
            inputs: the batch.
            search: False where the loss is known to need no help.

        Raises:
            ValueError: the slopes differ, or the loss takes another path where parameters are displaced.
        """
        evaluate = repeatable(self.trainer, partial(loss, self.trainer, inputs))
        if not search:
            return evaluate
        spsa: SPSA = self.trainer.spsa
        kind = frozenset(inputs) if isinstance(inputs, Mapping) else frozenset()
        step, frozen = self.trainer.state.global_step, None
        expect_graph(True)
        if self._freezes.get(kind):
            frozen = self._record(spsa, loss, inputs)
        elif step >= self._search_at.get(kind, 0):  # ever more rarely: a loss may change in training
            frozen = self._search(spsa, loss, inputs)
            self._freezes[kind], self._search_at[kind] = frozen is not None, 2 * step + 1
        if self.tries and step != self._step:
            self._step = step
            self._check(spsa, loss, inputs)
        expect_graph(frozen is not None)
        return partial(self._replay, frozen, evaluate) if frozen is not None else evaluate

    def _record(self, spsa: SPSA, loss: Loss, inputs: Any) -> Frozen:
        return recorded(partial(loss, stand_in(self.trainer), inputs), trained(spsa))

    def _search(self, spsa: SPSA, loss: Loss, inputs: Any) -> Frozen | None:
        """A recording if the loss has factors to freeze, on any rank."""
        name, options = self._names()
        frozen = None
        try:
            with task("searching the loss for constants", once=True):
                frozen = self._record(spsa, loss, inputs)
        except Exception as error:  # no graph can be built of it, or it fails: its evaluation will tell
            logger.warning("%s: its loss could not be searched for constants (%s)", name, _line(error))
        wanted = of_all(spsa, float(frozen is not None and frozen.matters)) > 0
        if frozen is not None and wanted:
            logger.info(
                "%s: parts of its loss are constants to a gradient (%s). Differences take their values at theta, which "
                "costs one more forward pass for each batch",
                name,
                options,
            )
        return frozen if wanted else None

    def _replay(self, frozen: Frozen, closure: Closure) -> float:
        try:
            return frozen.replay(closure)
        except OtherPath as error:
            name, options = self._names()
            raise ValueError(
                f"zeroth_order({name}): the loss must take the same path through its code near theta, but {error} "
                f"({options}). Train it with its own backward pass"
            ) from error

    def _check(self, spsa: SPSA, loss: Loss, inputs: Any) -> None:
        self.tries -= 1
        name, options = self._names()
        try:
            with task("checking the slope of the loss", once=True):
                rows, slopes = self._first_slopes(spsa, loss, inputs)
        except Exception as error:  # too little memory, or what the evaluations to come will say as well
            self.tries = 0
            logger.warning("%s: the slope of its loss was not checked (%s)", name, _line(error))
            return
        if slopes is None or (slopes.agree and not slopes.clear):
            if not self.tries:
                logger.warning("%s: the slope of its loss was not checked (no rows had one above rounding)", name)
            return
        self.tries = 0
        numbers = f"{slopes.differences:.3g} by differences and {slopes.autograd:.3g} by autograd"
        if not slopes.agree:
            raise ValueError(
                f"zeroth_order({name}): differences of the loss must have the slope of its gradient, got {numbers} along "
                f"one direction ({options}). Its backward pass is not its derivative: change these options, train it "
                "with its own backward pass, or pass check_slope=False to follow the differences"
            )
        logger.info("%s: slope of its loss on %s: %s", name, rows, numbers)

    def _first_slopes(self, spsa: SPSA, loss: Loss, inputs: Any) -> tuple[str, Slopes | None]:
        """Of the first rows that have any; of the whole batch where two of its rows are no batch."""
        for rows, part in parts(inputs):
            try:
                slopes = compare(spsa, partial(loss, stand_in(self.trainer), part))
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:
                return WHOLE, compare(spsa, partial(loss, stand_in(self.trainer), inputs))
            if slopes is not None and slopes.larger:
                return rows, slopes
        return WHOLE, None

    def _names(self) -> tuple[str, str]:
        return base_name(type(self.trainer)), options_of(self.trainer)


def base_name(trainer_cls: type) -> str:
    return trainer_cls.__name__.removeprefix("ZerothOrder")


def options_of(trainer: Any) -> str:
    """The options of its own that a trainer's loss may depend on: those that are not their defaults."""
    common = {entry.name for entry in dataclasses.fields(TrainingArguments)} - {"label_smoothing_factor"}
    sizes = ("_size", "_length", "_generations", "_per_generation")
    found = []
    for entry in dataclasses.fields(trainer.args):
        value = getattr(trainer.args, entry.name)
        default = entry.default
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        plain = isinstance(value, bool | int | float | str | list)
        if entry.name == "loss_type" or (
            entry.name not in common and not entry.name.endswith(sizes) and plain and value != default
        ):
            found.append(f"{entry.name}={value!r}")
    if getattr(trainer, "compute_loss_func", None) is not None:
        found.append("compute_loss_func")
    return ", ".join(sorted(found, key=lambda text: not text.startswith("loss_type"))) or "no options"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
