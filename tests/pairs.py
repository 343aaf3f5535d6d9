"""Three pairs of answers, for every judge."""

from __future__ import annotations

from types import SimpleNamespace

TASK = SimpleNamespace(default_judge="chrf")
PROMPTS = ["Tell me about cats. " * 3, "Dogs?", "Hm"]
PAIRS = [["Cats purr.", "Cats are fine animals, and they sleep a lot."], ["Woof", "No"], ["yes", "no way"]]
NONE: list[str | None] = [None] * 3


def swapped(pairs):
    return [pair[::-1] for pair in pairs]
