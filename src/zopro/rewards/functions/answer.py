"""`exact` and `contains`: the row's answer, word for word or somewhere in the completion."""

from __future__ import annotations

import re
from unicodedata import normalize

from zopro.rewards.functions.base import Reward, for_each_answer
from zopro.tasks.words import UNSPACED

_LETTER = rf"[^\W{UNSPACED}]"  # or digit, of a script that parts its words
_ANYWHERE = re.compile(f"[{UNSPACED}]")
# A number goes on after a point, a comma or a slash, a word does not; a minus after a letter or a digit is a hyphen.
_BEFORE = rf"(?<!{_LETTER})(?<!\d[.,])"
_BEFORE_DIGIT = r"(?<!\A[-\u2212])(?<![^\w)\]}][-\u2212])"
_FRACTION = re.compile(r"(?<![\d/])(?<!/\s)\d{1,9}\s?/\s?\Z")  # up to its denominator; 5/6/2024 is a date
_AFTER, _AFTER_DIGIT = rf"(?!{_LETTER})(?![.,]\d)", r"(?!\s?/\s?\d)"
# Markdown's, and no name of a program as in a.__init__(); an asterisk is no letter anyway.
_EMPHASIS = re.compile(r"(?<!\w)(?<!\w\.)(_{1,3})([^\W_][^_\n]*)\1(?![\w(\[]|\.\w)")


def is_exactly(text: str, answer: str) -> bool:
    """Whether the text is the answer; runs of white space are one blank, case counts, ways to encode an accent do not.

    >>> is_exactly(" New  York", "New York"), is_exactly("new york", "New York")
    (True, False)
    """
    return normalize("NFC", text).split() == normalize("NFC", answer).split()


def has(text: str, answer: str) -> bool:
    """Whether the answer stands in the text as whole words or numbers, whatever their case.

    In a script without spaces it may stand anywhere.

    >>> has("It is PARIS.", "Paris"), has("14", "4"), has("3.14", "3"), has("-3", "3")
    (True, False, False, False)
    """
    parts = normalize("NFC", answer).split()
    if not parts:
        return False
    words = r"\s+".join(map(re.escape, parts))
    begin, end = parts[0][0], parts[-1][-1]
    before = ("" if _ANYWHERE.match(begin) else _BEFORE) + (_BEFORE_DIGIT if begin.isdecimal() else "")
    after = ("" if _ANYWHERE.match(end) else _AFTER) + (_AFTER_DIGIT if end.isdecimal() else "")
    text = normalize("NFC", text)
    return any(
        not (begin.isdecimal() and _FRACTION.search(read[: match.start()][-14:]))
        for read in (text, _EMPHASIS.sub(r"\2", text))
        for match in re.finditer(f"{before}{words}{after}", read, re.IGNORECASE)
    )


def exact(parameter: str = "") -> Reward:
    """1 for a completion that is the row's answer, else 0; None for a row without one."""
    return for_each_answer(is_exactly)


def contains(parameter: str = "") -> Reward:
    """1 for a completion in which the row's answer stands, else 0; None for a row without one."""
    return for_each_answer(has)
