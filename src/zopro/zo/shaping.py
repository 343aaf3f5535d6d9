"""From the rewards of a population to numbers that a step can be made of, and to how much of them is noise.

Plain float64 sums by `math.fsum`, which have the same bits on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from zopro.choices import SHAPINGS

EQUAL = 1e-12  # spread of rewards, relative to the largest, that is rounding


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _scaled(rewards: Sequence[float]) -> list[float]:
    """Rewards in units of the power of two above the largest: exact, and with squares that numbers can hold."""
    exponent = -math.frexp(max(map(abs, rewards)))[1]
    return [math.ldexp(reward, exponent) for reward in rewards]


def alike(rewards: Sequence[float]) -> bool:
    """Whether rewards differ by no more than rounding, so that nothing tells members apart."""
    return max(rewards) - min(rewards) <= EQUAL * max(map(abs, rewards))


def z_score(rewards: Sequence[float]) -> list[float]:
    """(F - mean) / standard deviation over the population; 0 for all where they are alike.

    >>> z_score([1.0, 3.0])
    [-1.0, 1.0]
    """
    rewards = _scaled(rewards)
    centre = mean(rewards)
    deviation = math.sqrt(mean([(reward - centre) ** 2 for reward in rewards]))
    return [0.0 if alike(rewards) else (reward - centre) / deviation for reward in rewards]


def centred_rank(rewards: Sequence[float]) -> list[float]:
    """Ranks spread evenly over [-1/2, 1/2] (Salimans et al. 2017, section 2.1); equal rewards share the mean of theirs.

    >>> centred_rank([5.0, 90.0, 7.0])
    [-0.5, 0.5, 0.0]
    >>> centred_rank([1.0, 1.0, 8.0])
    [-0.25, -0.25, 0.5]
    """
    places: dict[float, list[int]] = {}
    for place, reward in enumerate(sorted(rewards)):
        places.setdefault(reward, []).append(place)
    last = max(1, len(rewards) - 1)
    return [0.0 if alike(rewards) else mean(places[reward]) / last - 0.5 for reward in rewards]


def shape(rewards: Sequence[float], name: str) -> list[float]:
    """By its name in `zopro.choices.SHAPINGS`."""
    shapes: dict[str, Callable[[Sequence[float]], list[float]]] = {"z_score": z_score, "centred_rank": centred_rank}
    assert shapes.keys() == set(SHAPINGS)
    return shapes[name](rewards)


def spread(rewards: Sequence[Sequence[float]]) -> tuple[float, float]:
    """How far members' mean rewards spread, and how far sampling alone would spread them: mean squares, (between, noise).

    The two-way layout of members and prompts, one reward in each cell: a prompt that is hard for all members says
    nothing, the rest of a cell beside its member's and its prompt's mean is noise. Without differences between members
    both are estimates of the same variance; `between` grows by the number of prompts times the variance of the members.

    Args:
        rewards: a row for each of at least 2 members, a column for each prompt.

    Returns:
        in units of the square of the power of two above the largest reward, which their ratio does not depend on.
        (NaN, NaN) for a single prompt, of which no noise can be estimated.

    >>> spread([[0.0, 0.5], [0.25, 0.75]])  # members differ by 1/4, whatever the prompt
    (0.0625, 0.0)
    """
    members, prompts = len(rewards), len(rewards[0])
    flat = _scaled([value for row in rewards for value in row])
    rewards = [flat[start : start + prompts] for start in range(0, len(flat), prompts)]
    if prompts < 2:
        return math.nan, math.nan
    rows, columns = [mean(row) for row in rewards], [mean(column) for column in zip(*rewards, strict=True)]
    centre = mean(rows)
    between = prompts * math.fsum((row - centre) ** 2 for row in rows) / (members - 1)
    rest = math.fsum(
        (value - row - column + centre) ** 2
        for values, row in zip(rewards, rows, strict=True)
        for value, column in zip(values, columns, strict=True)
    )
    rounding = prompts * (EQUAL * max(abs(value) for row in rewards for value in row)) ** 2
    noise = rest / ((members - 1) * (prompts - 1))
    return between if between > rounding else 0.0, noise if noise > rounding else 0.0
