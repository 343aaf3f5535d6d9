"""Keys: read from the environment, and taken out of what others say before that is shown or kept."""

from __future__ import annotations

import os
import re

from zopro.errors import InputError

_WINDOW = 8
"""Characters of a key that give it away."""
_SHORTEST = 6
"""Characters of a key that is one. What is shorter, such as x or EMPTY, is given to endpoints that want none."""


def from_environment(variable: str, shown: str = "") -> str:
    """The key in an environment variable; empty where it is not set.

    Args:
        shown: what a message calls the variable; by default its name.

    Raises:
        InputError: no header can hold it. The message does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"{shown or variable}: must hold a key of printable ASCII characters in one line, got another text. "
            "Export the key alone."
        )
    return key


def redacted(text: str, key: str) -> str:
    """`text` without the words that hold the key or eight characters of it; all of it where there is no key, or one of
    fewer than six characters, which keeps no secret and stands in ordinary words.

    >>> redacted("Incorrect API key provided: sk-1234567890.", "sk-1234567890")
    'Incorrect API key provided: [redacted].'
    >>> redacted("temperature is not supported", "t")
    'temperature is not supported'
    """
    if len(key) < _SHORTEST:
        return text
    parts = {key[i : i + _WINDOW] for i in range(max(1, len(key) - _WINDOW + 1))}
    words = text.replace(key, "[redacted]")
    return re.sub(r"\S+", lambda word: "[redacted]" if any(part in word[0] for part in parts) else word[0], words)
