"""What built-in rewards are made of: the text of a completion, and the answers of a row.

A reward has TRL's signature: f(prompts, completions, **columns) -> one number for each completion, or None where it does
not apply. A completion is a text or, for rows of messages, a list of messages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zopro.tasks.solutions import answers_of

Reward = Callable[..., list[float | None]]
Completion = str | Sequence[Mapping[str, Any]]


def text_of(completion: Completion) -> str:
    """The text of a completion; of several messages the last one's.

    >>> text_of("42"), text_of([{"role": "assistant", "content": "42"}])
    ('42', '42')
    """
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def for_each_answer(right: Callable[[str, str], bool]) -> Reward:
    """The reward that is 1 where `right(text, answer)` says so of any answer of the row, else 0; None without one."""
    return for_all_answers(lambda text, answers: any(right(text, answer) for answer in answers))


def for_all_answers(right: Callable[[str, Sequence[str]], bool]) -> Reward:
    """The reward that is 1 where `right(text, answers)` says so of the row's answers, else 0; None without one."""

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        rows = ((text_of(text), answers_of(answer)) for text, answer in zip(completions, columns["answer"], strict=True))
        return [float(right(text, answers)) if answers else None for text, answers in rows]

    return reward


def for_each_text(score: Callable[[str], float]) -> Reward:
    """The reward that is `score(text)`, whatever the row."""

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        return [score(text_of(completion)) for completion in completions]

    return reward
