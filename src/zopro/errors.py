"""Exceptions of which the command line prints one line: bad input (exit code 2), a machine that gives out (1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: one clear line that names the argument, the rule, the value received and the remedy."""


class Stopped(RuntimeError):
    """The work cannot go on through no fault of its input (a full disk): one line with the cause and the remedy."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known word, or an empty string if none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
