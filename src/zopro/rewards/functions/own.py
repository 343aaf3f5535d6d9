"""`python:MODULE:FUNCTION`: a reward function of one's own, plain or async, as TRL calls it."""

from __future__ import annotations

from typing import Any

from zopro.choices import imported
from zopro.errors import InputError


def own(path: str) -> Any:
    """The function that "MODULE:FUNCTION" names. Raises `InputError`: there is none, or it cannot be called."""
    function = imported(path, "reward")
    if not callable(function):
        raise InputError(f"reward: must be callable, got {path!r}, which is {type(function).__name__}.")
    if isinstance(function, type):
        raise InputError(f"reward: must be a function or an object, got {path!r}, a class. Name an object of it.")
    return function
