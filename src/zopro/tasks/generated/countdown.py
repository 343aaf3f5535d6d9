"""Countdowns: reach a target from given numbers, each used once. Every one can be solved, by the solution in its row.

The row has the columns of published sets (`nums`, `target`), so that `reward: countdown` and TRL's own scripts read it.
"""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

from zopro.errors import InputError
from zopro.tasks.generated.drawing import Problem, distinct
from zopro.tasks.verifiable import countdown_prompt

LARGEST_NUMBER, TARGETS = 99, range(10, 101)
NUMBERS = range(2, 7)

Term = tuple[str, Fraction, bool]  # as it is written, its value, and whether it needs brackets inside a product


def countdown(rows: int, split: str = "train", seed: int = 0, numbers: int = 3) -> list[dict[str, Any]]:
    """Rows {"prompt", "nums", "target", "solution"} with `numbers` numbers from 1 to 99 and a target from 10 to 100.

    The same numbers in another order, with the same target, are one problem. Raises `InputError` for an argument that is
    out of range, and for more rows than there are problems.
    """
    if numbers not in NUMBERS:
        raise InputError(f"--numbers: must be from {NUMBERS[0]} to {NUMBERS[-1]}, got {numbers}.")

    def draw(rng: random.Random) -> Problem:
        while True:
            nums = [rng.randint(1, LARGEST_NUMBER) for _ in range(numbers)]
            text, value, _ = _combined([(str(number), Fraction(number), False) for number in nums], rng)
            if value in TARGETS:
                target = int(value)
                rng.shuffle(nums)
                row = {"prompt": countdown_prompt(nums, target), "nums": nums, "target": target}
                return (*sorted(nums), target), {**row, "solution": f"{text} = {target}"}

    return distinct(draw, "countdown", rows, split, seed)


def _combined(terms: list[Term], rng: random.Random) -> Term:
    """One term of all of them, by operations drawn at random; of a division or a difference that would not come out as a
    whole number above 0, the sum instead."""
    while len(terms) > 1:
        rng.shuffle(terms)
        (left, a, loose), (right, b, other) = terms.pop(), terms.pop()
        sign = rng.choice("+-*/")
        if (sign == "/" and (a / b).denominator > 1) or (sign == "-" and a <= b):
            sign = "+"
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
        if sign in "*/":
            left = f"({left})" if loose else left
            right = f"({right})" if other or (sign == "/" and not right.isdecimal()) else right
        elif sign == "-":
            right = f"({right})" if other else right
        terms.append((f"{left} {sign} {right}", value, sign in "+-"))
    return terms[0]
