"""`exact` and `contains`: the row's answer, word for word or somewhere in the completion."""

from __future__ import annotations

import re

from zopro.rewards.functions.base import Reward, for_each_answer


def is_exactly(text: str, answer: str) -> bool:
    """Whether the text is the answer; runs of white space are one blank, and case counts.

    >>> is_exactly(" New  York", "New York"), is_exactly("new york", "New York")
    (True, False)
    """
    return text.split() == answer.split()


def has(text: str, answer: str) -> bool:
    """Whether the answer stands in the text as whole words, whatever their case.

    >>> has("It is PARIS.", "Paris"), has("14", "4"), has("3.14", "3")
    (True, False, False)
    """
    words = r"\s+".join(map(re.escape, answer.split()))
    # A number goes on after a point or a comma, a word does not.
    before, after = r"(?<!\w)(?<!\d[.,])", r"(?!\w)(?![.,]\d)"
    return re.search(f"{before}{words}{after}", text, re.IGNORECASE) is not None


def exact(parameter: str = "") -> Reward:
    """1 for a completion that is the row's answer, else 0; None for a row without one."""
    return for_each_answer(is_exactly)


def contains(parameter: str = "") -> Reward:
    """1 for a completion in which the row's answer stands, else 0; None for a row without one."""
    return for_each_answer(has)
