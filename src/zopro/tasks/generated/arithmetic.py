"""Sums, differences and products of two-digit numbers, in four difficulties.

| difficulty | problem |
|---|---|
| 1 | a + b or a - b of two-digit numbers; the difference is not negative |
| 2 | a * b, a two-digit number times a digit from 2 to 9 |
| 3 | a * b of two-digit numbers |
| 4 | a * b + c or a * b - c: difficulty 3, and then difficulty 1 |
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from zopro.errors import InputError
from zopro.tasks.generated.drawing import Problem, distinct

DIFFICULTIES = (1, 2, 3, 4)


def arithmetic(
    rows: int, split: str = "train", seed: int = 0, difficulties: Sequence[int] = (1, 2)
) -> list[dict[str, Any]]:
    """Rows {"prompt", "answer", "difficulty"}, of each difficulty about as many.

    a + b and b + a are one problem. Raises `InputError` for an argument that is out of range, and for more rows than
    there are problems.

    >>> arithmetic(1)[0]["prompt"]
    'What is 53 - 44?'
    """
    if not difficulties or not set(difficulties) <= set(DIFFICULTIES):
        given = " ".join(map(str, difficulties))
        raise InputError(f"--difficulty: must be among {', '.join(map(str, DIFFICULTIES))}, got {given or 'none'}.")

    def draw(rng: random.Random) -> Problem:
        difficulty = rng.choice(difficulties)
        text, value, key = _problem(difficulty, rng)
        return key, {"prompt": f"What is {text}?", "answer": str(value), "difficulty": difficulty}

    return distinct(draw, "arithmetic", rows, split, seed)


def _problem(difficulty: int, rng: random.Random) -> tuple[str, int, tuple[Any, ...]]:
    """How it is written, what it comes to, and what makes it the same problem."""
    a, b, c = (rng.randint(10, 99) for _ in range(3))
    if difficulty == 1:
        if rng.random() < 0.5:
            return f"{a} + {b}", a + b, ("+", *sorted((a, b)))
        a, b = max(a, b), min(a, b)
        return f"{a} - {b}", a - b, ("-", a, b)
    if difficulty == 2:
        b = rng.randint(2, 9)
    if difficulty < 4:
        left, right = (a, b) if rng.random() < 0.5 else (b, a)
        return f"{left} * {right}", a * b, ("*", *sorted((a, b)))
    if rng.random() < 0.5:
        return f"{a} * {b} + {c}", a * b + c, ("*+", *sorted((a, b)), c)
    return f"{a} * {b} - {c}", a * b - c, ("*-", *sorted((a, b)), c)
