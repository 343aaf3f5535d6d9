"""`json` and `json:KEY,KEY`: the completion parses as JSON, and as an object it has the keys."""

from __future__ import annotations

import json
from typing import Any

from zopro.errors import InputError
from zopro.rewards.functions.base import Reward, for_each_text

_FENCE = "```"


def structured(keys: str = "") -> Reward:
    """The reward of an object with these keys, separated by commas; of any JSON without keys.

    It is 0 for what is no JSON, else the share of 1 + (number of keys) that is there. A fence of three backquotes around
    the whole is no part of it. Raises `InputError` for an empty key.

    >>> structured("name,age")(["?"] * 3, ['{"name": "Bo", "age": 3}', '{"name": "Bo"}', "Bo"])
    [1.0, 0.6666666666666666, 0.0]
    """
    wanted = [key.strip() for key in keys.split(",")] if keys else []
    if not all(wanted):
        raise InputError(f"reward: json must be followed by keys with commas between them, got {keys!r}.")

    def score(text: str) -> float:
        try:
            value = _parsed(text)
        except (ValueError, RecursionError):  # among them integers of thousands of digits
            return 0.0
        found = sum(key in value for key in wanted) if isinstance(value, dict) else 0
        return (1 + found) / (1 + len(wanted))

    return for_each_text(score)


def _parsed(text: str) -> Any:
    return json.loads(_without_fence(text), parse_constant=_refuse)


def _without_fence(text: str) -> str:
    """What stands on the lines between two fences, of which the first may name the language; else the text itself."""
    whole = text.strip()
    inside = whole.removeprefix(_FENCE).removesuffix(_FENCE)
    if len(whole) - len(inside) < 2 * len(_FENCE):
        return text
    inside = inside[4:] if inside[:4].lower() == "json" else inside
    start, end = inside[: len(inside) - len(inside.lstrip())], inside[len(inside.rstrip()) :]
    if "\n" not in start or "\n" not in end:
        return text
    return inside[start.rindex("\n") + 1 : inside.rindex("\n")]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
