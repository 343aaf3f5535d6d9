"""Answers as data sets write them: after a worked solution, in a box, or as the numbers of a countdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from zopro.errors import InputError
from zopro.tasks.base import as_number
from zopro.tasks.literals import blank, spelled, spells_messages, spells_texts
from zopro.tasks.messages import message_list

MARK = "####"
"""Before the answer, after a worked solution (GSM8K)."""
BOX = r"\boxed{"


def final_answer(text: str) -> str:
    r"""What a solution ends with: in the last box, else on the line after the last mark, else all of it. A mark before
    several lines is a heading.

    >>> final_answer("3 + 4 = 7\n#### 7"), final_answer(r"so $x = \boxed{\frac{1}{2}}$."), final_answer(" Paris ")
    ('7', '\\frac{1}{2}', 'Paris')
    """
    inside, after = boxed(text), text.rpartition(MARK)[2].strip()
    if inside is not None:
        return inside.strip()
    return after if MARK in text and "\n" not in after else text.strip()


def as_written(answer: str | float) -> str:
    """An answer as text. A whole number is written as one: a column of them with a gap is one of floats.

    >>> as_written(4.0), as_written(0.5), as_written(7), as_written("4.0")
    ('4', '0.5', '7', '4.0')
    """
    whole = isinstance(answer, float) and answer.is_integer() and abs(answer) < 2**53
    return str(int(answer) if whole else answer)


def answers_in(value: Any) -> list[Any]:
    """The answers that a cell holds, any of which is right: a text or a number, a list of them (also as text), or the
    content of the last of several messages. What says nothing is left out: null, NaN, white space.

    Raises `InputError` for an object, and what reading messages raises.

    >>> answers_in("['Paris', 'Lutetia']"), answers_in([1, None, " "]), answers_in([{"role": "user", "content": "Hi"}])
    (['Paris', 'Lutetia'], [1], ['Hi'])
    """
    messages = message_list(value, "answer") if _messages(value) else None
    if messages is not None:
        value = messages[-1].get("content")
    elif isinstance(value, str) and spells_texts(value):
        value = spelled(value)
    found = [one for one in (value if isinstance(value, list | tuple) else [value]) if not _nothing(one)]
    for one in found:
        if not isinstance(one, str | int | float):
            raise InputError(f"answer: must be text, a number or a list of them, got {type(one).__name__}")
    return found


def answers_of(value: Any) -> list[str]:
    """What a row's `answer` accepts (`answers_in`), as texts; of worked solutions their end.

    >>> answers_of("3 + 4 = 7 #### 7"), answers_of([1.0, "one"]), answers_of(None)
    (['7'], ['1', 'one'], [])
    """
    return [text for one in answers_in(value) if (text := final_answer(as_written(one)))]


def _messages(value: Any) -> bool:
    """Whether a cell holds messages, or one, written out or not."""
    if isinstance(value, str):
        return spells_messages(value)
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and bool({"role", "from"} & {*first})


def _nothing(value: Any) -> bool:
    return blank(value) or (isinstance(value, float) and math.isnan(value))


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
