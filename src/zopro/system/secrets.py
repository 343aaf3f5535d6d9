"""Keys in what others say: taken out before a message is shown or kept."""

from __future__ import annotations

import re

_WINDOW = 8
"""Characters of a key that give it away."""


def redacted(text: str, key: str) -> str:
    """`text` without the words that hold the key or eight characters of it; all of it where there is no key.

    >>> redacted("Incorrect API key provided: sk-1234567890.", "sk-1234567890")
    'Incorrect API key provided: [redacted].'
    """
    if not key:
        return text
    parts = {key[i : i + _WINDOW] for i in range(max(1, len(key) - _WINDOW + 1))}
    words = text.replace(key, "[redacted]")
    return re.sub(r"\S+", lambda word: "[redacted]" if any(part in word[0] for part in parts) else word[0], words)
