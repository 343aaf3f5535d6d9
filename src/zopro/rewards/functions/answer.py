"""`exact` and `contains`: the row's answer, word for word or somewhere in the completion."""

from __future__ import annotations

import re

from zopro.rewards.functions.base import Builtin, for_each_answer, plain


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


EXACT = Builtin(plain(for_each_answer(is_exactly)), "1 if the completion is the row's answer, else 0", needs=("answer",))
CONTAINS = Builtin(
    plain(for_each_answer(has)), "1 if the row's answer stands in the completion, else 0", needs=("answer",)
)
