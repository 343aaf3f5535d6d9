"""What an analysis has found, in a sentence or two: how the updates stand to each other, beside chance."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from statistics import median
from typing import Any

from zopro.analysis.numbers.series import ZERO
from zopro.analysis.page.figures import decimals, short
from zopro.store import shown

Numbers = dict[str, Any]
LITTLE = 0.5  # a cosine below it, in most of the iterations that chance does not explain, keeps only a little


def findings(numbers: Numbers) -> str:
    """In the view `product`, what the model feels; where no two updates can be compared, how far the policy moved."""
    sides = {"policy": "The policy", "reward": "The reward model"}
    sentences = [*_angle(numbers)]
    for side, who in sides.items():
        sentences += _direction(numbers, f"{side}_momentum_cosine", who)
    if not sentences:
        lengths, single = _values(numbers, "policy_update_norm"), len(numbers["iterations"]) == 1
        moved = "The policy moved" if single else "In the last iteration the policy moved"
        moved = f"{moved} by a length of {short(lengths[-1][1])}. " if lengths else ""
        if single and not numbers["reward"]:
            return f"{moved}What updates have in common shows from the second one on."
        return f"{moved}No two updates can be compared: one that moves nothing has no direction."
    return " ".join([*_still(numbers, sides), *sentences])


def _angle(numbers: Numbers) -> Iterator[str]:
    name = "update_angle_degrees"
    if found := _values(numbers, name):
        outside = sum(not _by_chance(numbers, name, i, value) for i, value in found)
        counted = f"in {outside} of {len(found)} iterations " if len(found) > 1 else ""
        related = (
            f"{counted}beyond what unrelated updates give (1 in 20 is by chance)"
            if outside
            else "which is what unrelated updates give by chance"
        )
        angles = _range(found, decimals(numbers, name, numbers["views"][-1]) or 2)
        yield f"The updates of policy and reward model are at {angles} degrees to each other, {related}."


def _direction(numbers: Numbers, name: str, who: str) -> Iterator[str]:
    if found := _values(numbers, name):
        outside = [value for i, value in found if not _by_chance(numbers, name, i, value)]
        kept, back = sum(value > 0 for value in outside), sum(value < 0 for value in outside)
        told, chance = "does not keep its direction", "by chance 0"
        little = bool(outside) and median(map(abs, outside)) < LITTLE
        if outside and kept >= back:
            told = "keeps a little of its direction" if little else "keeps its direction"
        elif outside:
            told = "turns back a little" if little else "turns back"
        if outside and len(found) not in (kept, back):
            told = f"partly {told}"
            ways = " and ".join(f"{way} in {n}" for way, n in (("onwards", kept), ("backwards", back)) if n)
            chance += f"; beyond what unrelated updates give {ways} of {len(found)} iterations, 1 in 40 by chance"
        yield f"{who} {told} from one update to the next (cosine {_range(found, 2)}, {chance})."


def _still(numbers: Numbers, sides: dict[str, str]) -> Iterator[str]:
    """Where a side did not move: such updates have no direction, and no other sentence is about them."""
    lengths = {side: [value for _, value in _values(numbers, f"{side}_update_norm")] for side in sides}
    rounding = ZERO**0.5 * max(chain.from_iterable(lengths.values()), default=0.0)
    for side, who in sides.items():
        if still := sum(value <= rounding for value in lengths[side]):
            of = len(lengths[side])
            yield f"{who} did not move{f' in {still} of {of} iterations' if still < of else ''}."


def _values(numbers: Numbers, name: str) -> list[tuple[int, float]]:
    """Iteration's position and value, where there is one."""
    values = numbers["metrics"].get(name, {}).get(numbers["views"][-1]) or []
    return [(i, value) for i, value in enumerate(values) if value is not None]


def _by_chance(numbers: Numbers, name: str, i: int, value: float) -> bool:
    """Whether random directions give it, or this very pair of updates would without a relation (the permutation)."""
    view = numbers["views"][-1]
    band = numbers["chance"].get(name, {}).get(view)
    pairs = [] if band is None else [(band["low"][i], band["high"][i])]
    pairs += (numbers["permutation"].get(name, {}).get(view) or [])[i : i + 1]
    return any(pair is not None and pair[0] is not None and pair[0] <= value <= pair[1] for pair in pairs)


def _range(found: list[tuple[int, float]], digits: int) -> str:
    values = [value for _, value in found]
    low, high = shown.fixed(min(values), digits), shown.fixed(max(values), digits)
    return low if low == high else f"{low} to {high}"
