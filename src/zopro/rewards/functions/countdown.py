"""`countdown`: an equation that uses each of the row's numbers once and reaches its target.

It is looked for in the last <answer>...</answer>, else in the last boxed expression, else it is the last one in the text.
It is read with `ast` and computed in fractions; nothing is evaluated as code.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from zopro.rewards.functions.base import Completion, Reward, text_of
from zopro.tasks.solutions import boxed, numbers_of

RIGHT_NUMBERS = 0.1
"""What an equation gets that uses the numbers but misses the target: a first step where the target is rarely reached."""

_READ, _LONGEST = 10_000, 500  # characters at the end of a text that are read, and of an equation
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-", "·": "*", "[": "(", "]": ")", "{": "(", "}": ")"})  # noqa: RUF001
_WORDS = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\left", ""), ("\\right", ""))
_EQUATION = re.compile(r"[\d(+-][\d\s+\-*/().=]*")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def score(text: str, nums: Sequence[int], target: Fraction | int) -> float:
    """1 if the text's equation uses each of `nums` once and equals `target`, 0.1 if only the first holds, else 0.

    >>> score("I try (3 + 4) * 5 = 35.", [3, 4, 5], 35), score("3 + 4 + 5", [3, 4, 5], 35), score("35", [3, 4, 5], 35)
    (1.0, 0.1, 0.0)
    """
    best = 0.0
    for side in _equation(text).split("="):
        try:
            value, used = _computed(side)
        except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
            continue
        if sorted(used) == sorted(nums):
            best = max(best, 1.0 if value == target else RIGHT_NUMBERS)
    return best


def _equation(text: str) -> str:
    """The text's equation, in the signs of Python; empty if there is none."""
    tagged = _ANSWER.findall(text)
    place = tagged[-1] if tagged else boxed(text) or text
    for word, sign in _WORDS:
        place = place.replace(word, sign)
    lines = place[-_READ:].translate(_SIGNS).splitlines()
    found = [piece for line in lines for match in _EQUATION.findall(line) if (piece := match.rstrip(" \t.=+-*/("))]
    computed = [
        piece for piece in found if re.search(r"[\d)]\s*[-+*/]", piece)
    ]  # a lone number only if it is all there is
    return (computed or found or [""])[-1][:_LONGEST]


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


def countdown(parameter: str = "") -> Reward:
    """`score` of each completion, by the columns `nums` and `target`; None where a row has none."""

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        rows = zip(completions, columns["nums"], columns["target"], strict=True)
        return [
            None if nums is None or target is None else score(text_of(completion), *numbers_of(nums, target))
            for completion, nums, target in rows
        ]

    return reward
