"""`countdown`: an equation that uses each of the row's numbers once and reaches its target.

It is looked for in the last <answer>...</answer>, else in the last boxed expression, else it is the last one in the text.
It is read with `ast` and computed in fractions; nothing is evaluated as code.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any

from zopro.rewards.functions.base import Completion, Reward, text_of
from zopro.tasks.columns import says_nothing
from zopro.tasks.solutions import boxed, numbers_of

RIGHT_NUMBERS = 0.1
"""What an equation gets that uses the numbers but misses the target: a first step where the target is rarely reached."""

_READ, _LONGEST = 10_000, 500  # characters at the end of a text that are read, and of an equation
_TAG = re.compile("<(/?)answer>", re.IGNORECASE)
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-", "·": "*", "[": "(", "]": ")", "{": "(", "}": ")"})  # noqa: RUF001
_WORDS = (
    *(("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\left", ""), ("\\right", "")),
    *((sign, " ") for sign in ("\\[", "\\]", "\\(", "\\)")),  # around formulas
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_CROSS = re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])")
_EQUATION = re.compile(r"[\d(+-][\d\s+\-*/().=]*")
_ITEM = re.compile(r"(?:\(?\d{1,3}[.)]|-)\s+(?=[\d(+-])")  # the mark of a list's item, or a dash
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def score(text: str, nums: Sequence[int], target: Fraction | int) -> float:
    """1 if the text's equation holds, uses each of `nums` once and equals `target`; 0.1 if a side uses them; else 0.

    >>> score("I try (3 + 4) * 5 = 35.", [3, 4, 5], 35), score("3 + 4 + 5", [3, 4, 5], 35), score("35", [3, 4, 5], 35)
    (1.0, 0.1, 0.0)
    >>> score("(3 + 4) * 5 = 36", [3, 4, 5], 35)
    0.1
    """
    return max((_score(sides, nums, target) for sides in _readings(text)), default=0.0)


def _score(sides: Sequence[str], nums: Sequence[int], target: Fraction | int) -> float:
    computed = []
    for side in sides:
        with suppress(ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
            computed.append(_computed(side))
    if not any(sorted(used) == sorted(nums) for _, used in computed):
        return 0.0
    return 1.0 if all(value == target for value, _ in computed) else RIGHT_NUMBERS


def _readings(text: str) -> list[list[str]]:
    """What the text's equation says between its "=", in the signs of Python, in each way to read it."""
    place = _tagged(text)
    if place is None:
        place = boxed(text) or text
    for word, sign in _WORDS:
        place = place.replace(word, sign)
    place, fractions = place[-_READ:], 1
    while fractions:  # from within
        place, fractions = _FRACTION.subn(r"((\1)/(\2))", place)
    place = place.translate(_SIGNS)
    return [sides for written in {place, _CROSS.sub("*", place)} for sides in _readings_of(written.splitlines())]


def _tagged(text: str) -> str | None:
    """What the last <answer>...</answer> holds, or None. Each tag is read once: a text may be nothing else."""
    found, opened = None, None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            opened = tag.end()
        elif opened is not None:
            found, opened = text[opened : tag.start()], None
    return found


def _readings_of(lines: Sequence[str]) -> list[list[str]]:
    found: list[tuple[str, int, int]] = []  # a line, and where an equation begins and ends in it
    for line in lines:
        for match in _EQUATION.finditer(line):
            if piece := match.group().rstrip(" \t.=+-*/("):
                found.append((line, match.start(), match.start() + len(piece[:_LONGEST])))
    # A lone number only if it is all there is.
    computed = [one for one in found if re.search(r"[\d)]\s*[-+*/]", one[0][one[1] : one[2]])]
    if not found:
        return []
    line, start, end = (computed or found)[-1]
    item = _ITEM.match(line, start, end)
    partners = _partners(line)
    return [
        [
            _bare(line, begin + side.start(), begin + side.end(), partners)
            for side in re.finditer("[^=]+", line[begin:end])
        ]
        for begin in (start, *([item.end()] if item else []))
    ]


def _partners(line: str) -> dict[int, int]:
    """Where the other half of each bracket stands."""
    partners: dict[int, int] = {}
    opened: list[int] = []
    for place, sign in enumerate(line):
        if sign == "(":
            opened.append(place)
        elif sign == ")" and opened:
            partners[place] = opened.pop()
            partners[partners[place]] = place
    return partners


def _bare(line: str, start: int, end: int, partners: dict[int, int]) -> str:
    """line[start:end] without brackets at its ends that enclose more than it: "((3 + 4) * 5 = 35)"."""
    while start < end and (line[start].isspace() or partners.get(start, start) >= end):
        start += 1
    while start < end and (line[end - 1].isspace() or partners.get(end - 1, end) < start):
        end -= 1
    return line[start:end]


def _computed(expression: str) -> tuple[Fraction, list[int]]:
    """Value of an expression and the whole numbers in it. Raises ValueError for anything but + - * / and brackets."""
    used: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
            return value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            result: Fraction = _OPERATORS[type(node.op)](value(node.left), value(node.right))
            return result
        raise ValueError(f"{type(node).__name__} is no part of an equation")

    return value(ast.parse(expression.strip(), mode="eval").body), used


def refuse(columns: Mapping[str, Any]) -> None:
    """Raise `InputError`: a row's `nums` are no whole numbers, or its `target` is no number."""
    numbers_of(columns["nums"], columns["target"])


def countdown(parameter: str = "") -> Reward:
    """`score` of each completion, by the columns `nums` and `target`; None where a row has none."""

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        rows = zip(completions, columns["nums"], columns["target"], strict=True)
        return [
            None if says_nothing(nums) or says_nothing(target) else score(text_of(completion), *numbers_of(nums, target))
            for completion, nums, target in rows
        ]

    return reward
