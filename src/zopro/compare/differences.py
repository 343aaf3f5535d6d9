"""What one method's rewards are above another's at the end, in numbers and in words: paired by prompt and seed.

Prompts that are easy for both, and answers sampled alike, do not widen the interval of a difference. Of one training each
it is over prompts alone: it says nothing about another seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from zopro.store import shown
from zopro.system.statistics import Interval, paired_interval

Gap = dict[str, float | None]  # mean, low and high


def without_nan(interval: Interval) -> tuple[float, float | None, float | None]:
    """For JSON: the bounds of a single number, which there are not, as None."""
    return (interval[0], None, None) if math.isnan(interval[1]) else interval


def gap(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Gap:
    """The rewards [seed][prompt] of the first less those of the second, with a 95 % interval."""
    return dict(zip(("mean", "low", "high"), without_nan(paired_interval(first, second)), strict=True))


def differences(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Gap]]:
    """[a][b]: the reward of a less that of b at the end of their trainings, with its 95 % interval.

    Methods that were summarised by earlier versions, without their rewards, are left out.
    """
    known = {name: method["final_rewards"] for name, method in methods.items() if "final_rewards" in method}
    table: dict[str, dict[str, Gap]] = {}
    for a, b in permutations(known, 2):
        table.setdefault(a, {})[b] = gap(known[a], known[b])
    return table


def trainings(method: Mapping[str, Any]) -> int:
    """How many of them a difference can be of."""
    return len(method.get("final_rewards", ())) or int(method["seeds"])


def paired_by(several: bool) -> str:
    """How two methods are paired, and what their difference leaves open; `several`: both have more than one training.

    >>> paired_by(True), paired_by(False)
    ('paired by prompt and seed', 'paired by prompt; one training each, so nothing about another seed')
    """
    if several:
        return "paired by prompt and seed"
    return "paired by prompt; one training each, so nothing about another seed"


def signed(found: Mapping[str, float | None]) -> str:
    """A gap with its sign and its interval."""
    bounds = shown.bounds({f"gap_{edge}": found[edge] for edge in ("low", "high")}, "gap")
    return f"{found['mean']:+.3f}" + ("" if bounds == shown.MISSING else f" {bounds}")


def difference_rows(result: Mapping[str, Any]) -> list[str]:
    """For compare.md: row less column, each pair of methods once with either sign."""
    table = result["differences"]
    if not table:
        return []
    counts = sorted(trainings(result["methods"][name]) for name in table)
    several = counts[-2] > 1  # of the two with the most trainings
    paired = paired_by(several)
    if several and counts[0] == 1:
        paired += "; a method of one training by prompt alone, which says nothing about another seed"
    cells = [[signed(table[a][b]) if a != b else "" for b in table] for a in table]
    return [
        f"Reward of the row's method less the column's, {paired}:",
        "",
        "| | " + " | ".join(table) + " |",
        "|---|" + "---|" * len(table),
        *(f"| {a} | " + " | ".join(row) + " |" for a, row in zip(table, cells, strict=True)),
        "",
    ]
