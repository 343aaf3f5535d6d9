"""The language of a text, by the package py3langid: the extra `languages`. Without it none is known."""

from __future__ import annotations

import math
from importlib.util import find_spec

WORDS = 8  # fewer are names and numbers more often than a language
SURE = 0.9


def language(text: str) -> str | None:
    """The ISO 639 code of the language of a text of eight words or more; None where it is not clear, or py3langid is not
    installed.

    >>> language("Paris."), language("12, 13 and 14")
    (None, None)
    """
    if len(text.split()) < WORDS or find_spec("py3langid") is None:
        return None
    import py3langid  # reads its model as it is imported

    (code, best), *others = py3langid.rank(text)  # log-probs but for a constant
    return str(code) if 1 / (1 + math.fsum(math.exp(score - best) for _, score in others)) >= SURE else None
