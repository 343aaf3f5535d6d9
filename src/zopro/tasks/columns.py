"""What a reward function gets of a row: its prompt as the row has it, and its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zopro.choices import REWARDS
from zopro.tasks.base import Example, Message
from zopro.tasks.literals import blank

RESERVED = (
    "prompt",
    "prompts",
    "completion",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)
"""Names that TRL gives a meaning of its own, so that no column can have them."""


def in_messages(example: Example) -> bool:
    """Whether prompt and answer are lists of messages for a reward: the row has some, or more than one turn."""
    return len(example.prompt) > 1 or any(map(_messages, example.columns.values()))


def _messages(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and bool({"role", "from"} & {*value[0]})
    )


def prompt_as_given(example: Example) -> str | list[Message]:
    """The prompt: a text, or messages."""
    return example.prompt if in_messages(example) else str(example.prompt[-1]["content"])


def answer_as_given(example: Example, answer: str) -> str | list[Message]:
    """A completion of the prompt, in the prompt's form."""
    return [{"role": "assistant", "content": answer}] if in_messages(example) else answer


def columns_of(example: Example) -> dict[str, Any]:
    """The row's columns; `answer` is the row's answer, also where a column of another name has it."""
    columns = {name: value for name, value in example.columns.items() if name not in RESERVED}
    if blank(columns.get("answer")):
        columns["answer"] = example.reference
    return columns


def lacking(example: Example, rewards: Sequence[str]) -> str | None:
    """Why a row cannot be rewarded: which column it lacks for which reward; None if it can."""
    columns = columns_of(example)
    for name in rewards:
        for column in REWARDS[name].needs:
            if blank(columns.get(column)):
                return f"the reward {name} needs {column}"
    return None
