"""What answers are worth: the rewards of a run, each of them computed and weighted, in training and in evaluation alike.

A reward is the run's own reward model, another network that scores, or a function with TRL's signature. Functions get a
row's prompt and its columns as the row has them: texts, or lists of messages where the row has messages.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zopro.choices import REWARDS
from zopro.loop.data import Item
from zopro.rewards import RewardModel
from zopro.system import guard
from zopro.system.statistics import known_mean
from zopro.tasks.base import Example
from zopro.tasks.columns import answer_as_given, columns_of, prompt_as_given

Texts = Callable[[Sequence[Sequence[int]]], list[str]]
Numbers = list[float]
"""One for each answer; NaN where a reward does not apply."""


@dataclass(frozen=True)
class Scores:
    """total: the weighted sum of those that apply, NaN where none does. parts: each reward's own numbers, by its name."""

    total: Numbers
    parts: dict[str, Numbers]

    def checked(self) -> Numbers | None:
        """1 where an answer is right, else 0, by the first reward that says so; None if none does."""
        return next((numbers for name, numbers in self.parts.items() if REWARDS[name].checks), None)


class Rewards:
    """The rewards of a run.

    Args:
        weights: of each reward, by its name.
        functions: those of them that are functions or networks, as TRL calls them.
        model: the run's own reward model, if it is one of them; its weights are the caller's to restore.
        texts: from completions to the answers they hold.
        batch_size: rows that the reward model scores at once.
        timeout: seconds for one call of a function of the user's. Built-in ones run in this thread, where what is slow in
            them has a time limit of its own.
        resumes: whether there is a run that can be continued once a broken one is mended; its line says so.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        functions: Mapping[str, Any],
        model: RewardModel | None,
        texts: Texts,
        batch_size: int,
        timeout: float = 0.0,
        resumes: bool = True,
    ) -> None:
        self.weights, self.model, self.texts, self.batch_size = weights, model, texts, batch_size
        then = "Then continue with --resume: what is finished is kept." if resumes else ""
        self.functions = {
            name: Function(function, 0.0 if getattr(function, "builtin", False) else timeout, then)
            for name, function in functions.items()
        }

    def score(self, items: Sequence[Item], completion_ids: Sequence[Sequence[int]], trainer_state: Any = None) -> Scores:
        """Of one completion of each item; `trainer_state` is that of the trainer they are for, if they are for one.

        Raises `InputError`: a function raises, is late, or returns no such numbers.
        """
        answers = self.texts(completion_ids) if self.functions else []
        parts = {name: self._part(name, items, completion_ids, answers, trainer_state) for name in self.weights}
        return Scores([self._sum(numbers) for numbers in zip(*parts.values(), strict=True)], parts)

    def _part(
        self, name: str, items: Sequence[Item], completion_ids: Sequence[Sequence[int]], answers: list[str], state: Any
    ) -> Numbers:
        if name in self.functions:
            return self.functions[name](items, answers, completion_ids, state)
        assert self.model is not None
        return self.model.score([item.ids for item in items], completion_ids, self.batch_size)

    def _sum(self, numbers: Sequence[float]) -> float:
        weighted = [weight * number for weight, number in zip(self.weights.values(), numbers, strict=True)]
        known = [number for number in weighted if not math.isnan(number)]
        return sum(known[1:], known[0]) if known else math.nan

    def as_reward_function(
        self, items: Sequence[Item], count: Callable[[Numbers], None] = lambda rewards: None
    ) -> Callable[..., Any]:
        """A reward function as TRL calls it, of answers to `items`, which the column `item` numbers; `count` is told each
        call's rewards."""
        if self.model is not None and list(self.weights.values()) == [1.0]:
            return self.model.as_reward_function(self.batch_size)
        places = {item.prompt: number for number, item in enumerate(items)}

        def reward(
            prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
        ) -> list[float | None]:
            numbers = columns.get("item") or [places[prompt] for prompt in prompts]
            scores = self.score([items[number] for number in numbers], completion_ids, columns.get("trainer_state"))
            for name, values in scores.parts.items() if len(scores.parts) > 1 and columns.get("log_metric") else ():
                columns["log_metric"](f"rewards/{name}", known_mean(values))
            count(scores.total)
            return [None if math.isnan(number) else number for number in scores.total]

        reward.checked = True  # type: ignore[attr-defined]
        return reward


class Function:
    """A function with TRL's signature over items, its answers checked."""

    def __init__(self, function: Any, timeout: float, then: str) -> None:
        narrowed = _narrowed(function)
        rest = 0.0 if guard.is_async(narrowed) else timeout  # else its own loop waits
        self.checked = guard.checked_reward(guard.waited_for(narrowed, timeout), rest, then)
        self.builtin = getattr(function, "builtin", False)

    def __call__(
        self, items: Sequence[Item], answers: Sequence[str], completion_ids: Sequence[Sequence[int]], trainer_state: Any
    ) -> Numbers:
        examples = [item.example if self.builtin else _apart(item.example) for item in items]
        columns = [columns_of(example) for example in examples]
        names = dict.fromkeys(name for row in columns for name in row)
        found: Numbers = self.checked(
            prompts=[prompt_as_given(example) for example in examples],
            completions=[answer_as_given(example, answer) for example, answer in zip(examples, answers, strict=True)],
            completion_ids=[list(ids) for ids in completion_ids],
            **{name: [row.get(name) for row in columns] for name in names},
            trainer_state=trainer_state,
            log_extra=_ignore,
            log_metric=_ignore,
        )
        return found


def _apart(example: Example) -> Example:
    """A row whose prompt and columns a function may change; what cannot be copied is the row's own."""
    columns: dict[str, Any] = {}
    for name, value in example.columns.items():
        try:
            columns[name] = copy.deepcopy(value)
        except TypeError:  # of a task of the user's, such as a lock
            columns[name] = value
    return replace(example, prompt=copy.deepcopy(example.prompt), columns=columns)


def _narrowed(function: Any) -> Any:
    """`function`, called with those of the arguments that it names if it has no **kwargs."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some that are written in C do not say
        return function
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return function

    def narrow(arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in arguments.items() if name in parameters}

    if guard.is_async(function):

        async def narrowed_async(**arguments: Any) -> Any:
            return await function(**narrow(arguments))

        return functools.update_wrapper(narrowed_async, function)

    def narrowed(**arguments: Any) -> Any:
        return function(**narrow(arguments))

    return functools.update_wrapper(narrowed, function)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """What TRL takes a function's own logs by; a run has none."""
