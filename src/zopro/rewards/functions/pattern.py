"""`regex:PATTERN`: 1 where Python's `re.search` finds the pattern in the completion, else 0."""

from __future__ import annotations

import re

from zopro.errors import InputError
from zopro.rewards.functions.base import Reward, for_each_text


def regex(pattern: str) -> Reward:
    """The reward of a pattern. Raises `InputError` for one that is no regular expression."""
    try:
        found = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"reward: regex must be a regular expression of Python, got {pattern!r} ({error}).") from None
    return for_each_text(lambda text: float(found.search(text) is not None))
