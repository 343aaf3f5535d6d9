"""`chrf` and `rouge`: how near a completion is to the row's reference, by metrics of translation and summarisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zopro.rewards.functions.base import Completion, Reward, text_of
from zopro.tasks.metrics import metric
from zopro.tasks.solutions import answers_in, as_written


def chrf(parameter: str = "") -> Reward:
    """chrF2 by 100 against the row's answer, the best of several; None for a row without one.

    >>> chrf()(["?"] * 2, ["ein Haus", "a mouse"], answer=["ein Haus", ["ein Haus", "a mouse"]])
    [1.0, 1.0]
    """
    return _nearness("chrf")


def rouge(parameter: str = "") -> Reward:
    """The mean F-measure of ROUGE-1, ROUGE-2 (for two words or more) and ROUGE-L, the best of several answers; None for a
    row without a word.

    >>> rouge()(["?"] * 2, ["the cat sat", "the cat"], answer=["the cat sat", None])
    [1.0, None]
    """
    return _nearness("rouge")


def _nearness(name: str) -> Reward:
    measure = metric(name)

    def score(text: str, references: Sequence[Any]) -> float | None:
        found = measure([text] * len(references), list(map(as_written, references)))
        known = [value for value in found if value is not None]
        return min(1.0, max(known) / 100) if known else None

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        rows = zip(completions, columns["answer"], strict=True)
        return [score(text_of(text), answers_in(answer)) for text, answer in rows]

    return reward
