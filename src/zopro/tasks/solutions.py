"""Answers as data sets write them: after a worked solution, in a box, or as the numbers of a countdown."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from zopro.errors import InputError
from zopro.tasks.base import as_number
from zopro.tasks.literals import spelled

MARK = "####"
"""Before the answer, after a worked solution (GSM8K)."""
BOX = r"\boxed{"


def final_answer(text: str) -> str:
    r"""What a solution ends with: after the last mark, else in the last box, else all of it.

    >>> final_answer("3 + 4 = 7\n#### 7"), final_answer(r"so $x = \boxed{\frac{1}{2}}$."), final_answer(" Paris ")
    ('7', '\\frac{1}{2}', 'Paris')
    """
    if MARK in text:
        return text.rpartition(MARK)[2].strip()
    inside = boxed(text)
    return (text if inside is None else inside).strip()


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} that is closed holds, or None."""
    start = text.rfind(BOX)
    depth = 0
    for position in range(start + len(BOX) - 1, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len(BOX) : position]
    return None


def numbers_of(nums: Any, target: Any) -> tuple[list[int], Fraction]:
    """A countdown's numbers and its target, from a list or from a list as text. Raises `InputError` for other values
    and `DropRow` for null.

    >>> numbers_of("[3, 4, 5]", 35)
    ([3, 4, 5], Fraction(35, 1))
    """
    try:
        values = spelled(nums) if isinstance(nums, str) else nums
        found = [Fraction(as_number(value, "nums")) for value in values]
    except (TypeError, ValueError):
        found = []
    if not found or any(number.denominator > 1 or number < 0 for number in found):
        raise InputError(f"nums: must be a list of whole numbers, got {nums!r:.60}")
    return [int(number) for number in found], Fraction(as_number(target, "target"))
