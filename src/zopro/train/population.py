"""A population's answers as numbers: what ranks tell each other of them, and what is logged of a step."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from zopro.zo.shaping import mean


class Scored(NamedTuple):
    """A member's answers, as numbers."""

    rewards: list[float]  # of each answer; NaN where no function applies
    lengths: list[float]  # of each, in tokens
    ended: list[float]  # of each: 1, or 0 for one that is cut off
    by_function: list[list[float]]  # of each reward function, for each answer
    prompt_tokens: float  # of all answers' prompts


def flat(member: Scored) -> list[float]:
    """A member as ranks exchange it."""
    answers = itertools.chain(member.rewards, member.lengths, member.ended, *member.by_function)
    return [*answers, member.prompt_tokens]


def joined(row: list[float], ranks: int, answers: int) -> Scored:
    """The inverse of `flat`, of all ranks' parts.

    >>> joined([*flat(Scored([1.0], [4.0], [0.0], [[1.0]], 3.0)), *flat(Scored([2.0], [5.0], [1.0], [[2.0]], 3.0))], 2, 1)
    Scored(rewards=[1.0, 2.0], lengths=[4.0, 5.0], ended=[0.0, 1.0], by_function=[[1.0, 2.0]], prompt_tokens=6.0)
    """
    width = len(row) // ranks
    parts = [row[rank * width : (rank + 1) * width] for rank in range(ranks)]
    firsts = range(0, width - 1, answers)
    columns = [[number for part in parts for number in part[first : first + answers]] for first in firsts]
    rewards, lengths, ended, *by_function = columns
    return Scored(rewards, lengths, ended, by_function, sum(part[-1] for part in parts))


def mean_of_finite(values: Sequence[float]) -> float:
    """NaN where there is none."""
    return mean(_finite(values) or [math.nan])


def total(rewards: Sequence[float], weights: Sequence[float], within: Sequence[float] | None = None) -> float:
    """The weighted sum of the rewards that apply, clipped to what it is to lie within; NaN where none does.

    >>> total([2.0, math.nan], [0.5, 1.0]), total([2.0, 3.0], [0.5, 1.0], (-1.0, 1.0))
    (1.0, 1.0)
    """
    apply = [weight * reward for weight, reward in zip(weights, rewards, strict=True) if not math.isnan(reward)]
    if not apply:
        return math.nan
    low, high = within or (-math.inf, math.inf)
    return min(max(sum(apply), low), high)


def numbers(members: Sequence[Scored], functions: Sequence[str], each: int = 1) -> dict[str, float]:
    """What a step logs, by TRL's names for what TRL logs too. As there, answers without a reward are left out.

    Args:
        functions: names of the reward functions, all different.
        each: a member's answers to a prompt that lie side by side, a divisor of all.
    """
    means = [mean_of_finite(member.rewards) for member in members]
    reward = mean_of_finite(means)
    firsts = range(0, len(members[0].rewards), each)
    alike = [_deviation([r for m in members for r in m.rewards[first : first + each]]) for first in firsts]
    ended = [share for member in members for share in member.ended]
    lengths = [length for member in members for length in member.lengths]
    whole = [length for length, share in zip(lengths, ended, strict=True) if share] or [0.0]
    found = {
        "reward": reward,
        "reward_std": _deviation([reward for member in members for reward in member.rewards]),
        "reward_best": max(_finite(means), default=math.nan),
        "reward_spread": math.sqrt(mean_of_finite([(value - reward) ** 2 for value in means])),
        "frac_reward_zero_std": mean([float(deviation < 1e-8) for deviation in alike]),
        "completions/clipped_ratio": 1 - mean(ended),
        "ended": mean(ended),
    }
    for infix, tokens in (("", lengths), ("terminated_", whole)):
        for name, reduce in (("mean", mean), ("min", min), ("max", max)):
            found[f"completions/{name}_{infix}length"] = reduce(tokens)
    for number, name in enumerate(functions):
        told = [value for member in members for value in member.by_function[number]]
        found[f"rewards/{name}/mean"] = mean_of_finite(told)
        found[f"rewards/{name}/std"] = _deviation(told)
    return found


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _deviation(values: Sequence[float]) -> float:
    """TRL's: over one less than there are, of those that are finite."""
    kept = _finite(values)
    return statistics.stdev(kept) if len(kept) > 1 else math.nan
