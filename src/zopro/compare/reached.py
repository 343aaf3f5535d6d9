"""How soon each method is where one of them ends: seconds, steps and answers to 90 % of its final gain."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from zopro.store import shown

SHARE = 0.9
USUAL = "rloo"  # whose gain is the measure where it is compared


def reached(methods: Mapping[str, Mapping[str, Any]], against: str = "") -> dict[str, Any]:
    """When each method's curve first has `SHARE` of what one method gained at the end, linearly between points.

    Args:
        methods: with their `curve` and, of comparisons that counted them, `answers_a_step`, or `answers` of the whole.
        against: whose final gain is the measure; else rloo's or, without it, that of the method with the largest.

    Returns:
        `of`, `share`, the `reward` to be reached, and `methods`: `seconds`, `step` and `answers` of each, None of one
        that did not reach it. Empty where the measure is no gain.
    """
    gains = {name: method["curve"][-1]["reward"] - method["curve"][0]["reward"] for name, method in methods.items()}
    of = yardstick(methods, against) or max(gains, key=lambda name: gains[name])
    if gains[of] <= 0:
        return {}
    reward = methods[of]["curve"][0]["reward"] + SHARE * gains[of]
    return {"of": of, "share": SHARE, "reward": reward, "methods": {n: _first(m, reward) for n, m in methods.items()}}


def yardstick(methods: Mapping[str, Mapping[str, Any]], against: str) -> str | None:
    """The method that others are set beside: the one that was named, or rloo; None if neither is compared."""
    return next((name for name in (against, USUAL) if name in methods), None)


def _first(method: Mapping[str, Any], reward: float) -> dict[str, float | None] | None:
    for before, after in pairwise(method["curve"]):
        if before["reward"] < reward <= after["reward"]:
            span = after["reward"] - before["reward"]
            part = (reward - before["reward"]) / span
            seconds, step = (before[key] + part * (after[key] - before[key]) for key in ("seconds", "step"))
            return {"seconds": seconds, "step": step, "answers": answers_at(method, step)}
    return None


def answers_at(method: Mapping[str, Any], step: float) -> float | None:
    """Answers that a training had sampled after so many steps; None of comparisons that did not count them."""
    if a_step := method.get("answers_a_step"):
        return step * float(a_step)
    last = method["curve"][-1]["step"]  # earlier versions kept the answers of a whole training alone
    return step * float(method["answers"]) / last if method.get("answers") and last else None


def column(result: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Method -> (name of the column, text); none where nothing was gained, or an earlier version compared."""
    found = result.get("reached")
    if not found:
        return {}
    title = f"To {found['share']:.0%} of {found['of']}'s gain"
    return {name: (title, _said(found["methods"].get(name))) for name in result["methods"]}


def _said(at: Mapping[str, Any] | None) -> str:
    if at is None:
        return "not reached"
    answers = "" if at["answers"] is None else f", {shown.fixed(at['answers'], 0)} answers"
    return f"{shown.seconds(at['seconds'])} s, {shown.fixed(at['step'], 1)} steps{answers}"
