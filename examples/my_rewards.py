"""Rewards of one's own with TRL's signature: prompts, completions, the row's columns -> a number for each completion."""

from __future__ import annotations

import re
from typing import Any

MOST = 0.7  # of a good translation's words are not in the source: a quarter of them have fewer, for their names


def short_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """The share of words of at most four letters; None (no reward) for an answer without a word."""
    words = [completion.split() for completion in completions]
    return [sum(len(word.strip(".,!?")) <= 4 for word in row) / len(row) if row else None for row in words]


def new_words(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """1 for an answer most of whose words are not in the prompt, less in proportion; 0 for a copy of it.

    Beside `chrf` it keeps a translation from staying in the source's language.
    """
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked, words = set(_words(prompt)), _words(completion)
        scores.append(min(1.0, sum(word not in asked for word in words) / (MOST * len(words))) if words else 0.0)
    return scores


def _words(said: Any) -> list[str]:
    """Of a text, or of the last of several messages."""
    return re.findall(r"\w+", (said if isinstance(said, str) else said[-1]["content"]).lower())
