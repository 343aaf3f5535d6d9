"""`length:MIN-MAX`: 1 for a completion of MIN to MAX words, and the less the further it is from them."""

from __future__ import annotations

import re

from zopro.errors import InputError
from zopro.rewards.functions.base import Reward, for_each_text


def length(bounds: str) -> Reward:
    """The reward of a range of words. Raises `InputError` for what is no range.

    >>> length("2-4")(["?"] * 4, ["a", "a b", "a b c d e f g h", ""])
    [0.5, 1.0, 0.5, 0.0]
    """
    numbers = re.fullmatch(r"(\d{1,9})-(\d{1,9})", bounds.strip())
    low, high = map(int, numbers.groups()) if numbers else (1, 0)
    if low > high or high == 0:
        raise InputError(f"reward: length must be MIN-MAX in words, such as length:20-60, got {bounds!r}.")

    def score(text: str) -> float:
        count = len(text.split())
        return count / low if count < low else high / count if count > high else 1.0

    return for_each_text(score)
