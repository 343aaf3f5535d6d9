"""What an analysis has found, in a sentence or two: how the updates stand to each other, beside chance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zopro.analysis.page.figures import decimals, short
from zopro.store import shown

Numbers = dict[str, Any]


def findings(numbers: Numbers) -> str:
    """In the view `product`, what the model feels; where no two updates can be compared, how far the policy moved."""
    sentences = [*_angle(numbers), *_direction(numbers, "policy_momentum_cosine", "The policy")]
    sentences += _direction(numbers, "reward_momentum_cosine", "The reward model")
    if not sentences:
        lengths, single = _values(numbers, "policy_update_norm"), len(numbers["iterations"]) == 1
        moved = "The policy moved" if single else "In the last iteration the policy moved"
        moved = f"{moved} by a length of {short(lengths[-1][1])}. " if lengths else ""
        if single and not numbers["reward"]:
            return f"{moved}What updates have in common shows from the second one on."
        return f"{moved}No two updates can be compared: one that moves nothing has no direction."
    return " ".join(sentences)


def _angle(numbers: Numbers) -> Iterator[str]:
    name = "update_angle_degrees"
    if found := _values(numbers, name):
        outside = sum(not _by_chance(numbers, name, i, value) for i, value in found)
        related = (
            f"in {outside} of {len(found)} iterations beyond what unrelated updates give (1 in 20 is by chance)"
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
        if len(found) in (kept, back):
            told = "keeps its direction" if kept else "turns back"
        elif outside:
            told = "partly keeps its direction" if kept >= back else "partly turns back"
            ways = " and ".join(f"{way} in {n}" for way, n in (("onwards", kept), ("backwards", back)) if n)
            chance += f"; beyond what unrelated updates give {ways} of {len(found)} iterations, 1 in 40 by chance"
        yield f"{who} {told} from one update to the next (cosine {_range(found, 2)}, {chance})."


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
