"""How many answers are right, and what answers are worth: numbers of one evaluation, and against what the run began with.

Every number is of the held-out prompts, which are what a 95 % interval is over: of several answers to a prompt their mean
counts. `pass_at_k` is the share of prompts of which at least one of the k sampled answers is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from zopro.errors import InputError
from zopro.loop.rewarding import Scores
from zopro.system.statistics import known_mean, mean_interval, win_interval

PAIRED = {
    "reward": "sampled_reward",
    "accuracy": "accuracy",
    "greedy_reward": "greedy_reward",
    "greedy_accuracy": "greedy_accuracy",
}
"""Numbers of an evaluation that are set beside those that the run began with, and what a prompt's row calls them."""

Bounded = dict[str, float | None]
"""Numbers with their bounds, which are None where there is but one to take them from."""


def of_prompts(scores: Scores, count: int) -> list[dict[str, float]]:
    """Of each prompt, from `count` answers to each: the mean reward and, where a reward checks answers, accuracy and
    whether any is right. A prompt of which no answer has a reward has none."""
    right = scores.checked()
    rows: list[dict[str, float]] = []
    for start in range(0, len(scores.total), count):
        row = {"sampled_reward": known_mean(scores.total[start : start + count])}
        if right is not None:
            whole = [float(value == 1) for value in right[start : start + count] if not math.isnan(value)]
            row |= {"accuracy": known_mean(whole), "passed": max(whole, default=math.nan)}
        rows.append({name: value for name, value in row.items() if not math.isnan(value)})
    return rows


def reward_interval(rows: Sequence[Mapping[str, Any]], name: str, of: str) -> Bounded:
    """The mean reward of prompts with its interval, under `name`. Raises `InputError`: no prompt has one."""
    values = [row[of] for row in rows if of in row]
    if not values:
        raise InputError(
            "reward: must give a number to at least one held-out answer, and gave None to all of them. Let it score "
            "more. Then continue with --resume: what is finished is kept."
        )
    return named(name, mean_interval(values))


def shares(rows: Sequence[Mapping[str, Any]], name: str, of: str) -> Bounded:
    """A share of prompts with its Wilson interval, under `name`; nothing where no prompt has it."""
    values = [row[of] for row in rows if of in row]
    return named(name, win_interval(values)) if values else {}


def gains(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Bounded:
    """What prompts have gained, paired: `reward_gain`, `accuracy_gain`, ... with their intervals."""
    found: Bounded = {}
    for name, of in PAIRED.items():
        if interval := paired(before, after, of):
            found |= named(f"{name}_gain", interval)
    return found


def paired(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], of: str
) -> tuple[float, float, float] | None:
    """The mean gain of prompts in `of` with its interval; None where no prompt has it before and after."""
    pairs = zip(after, before, strict=True)
    differences = [a[of] - b[of] for a, b in pairs if _is_number(a.get(of)) and _is_number(b.get(of))]
    return mean_interval(differences) if differences else None


def named(name: str, interval: tuple[float, float, float]) -> Bounded:
    """A number with its bounds, under `name`; of a single one there are none."""
    mean, *bounds = interval
    low, high = (None if math.isnan(bound) else bound for bound in bounds)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
