"""A reward of one's own with TRL's signature: prompts, completions, the row's columns -> a number for each completion."""

from __future__ import annotations

from typing import Any


def short_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """The share of words of at most four letters; None (no reward) for an answer without a word."""
    words = [completion.split() for completion in completions]
    return [sum(len(word.strip(".,!?")) <= 4 for word in row) / len(row) if row else None for row in words]
