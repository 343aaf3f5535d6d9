"""What a reward function gets of a row: its prompt as the row has it, and its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zopro.choices import REWARDS, loaded
from zopro.errors import InputError
from zopro.tasks.base import DropRow, Example, Message
from zopro.tasks.literals import blank, spells_messages
from zopro.tasks.solutions import answers_in, answers_of, as_written, final_answer

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
ANSWERS = ("answer", "final_answer", "ground_truth", "solution", "completion")
"""Columns that may hold the answer; the first that says something does."""


def in_messages(example: Example) -> bool:
    """Whether prompt and answer are lists of messages for a reward: the row has some, or more than one turn."""
    return len(example.prompt) > 1 or any(map(_messages, example.columns.values()))


def _messages(value: Any) -> bool:
    """In any of the forms in which they are read: a list, one message, lists of roles and contents, or these as text."""
    if isinstance(value, str):
        return spells_messages(value)
    if isinstance(value, Mapping):
        return {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()
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
    if says_nothing(columns.get("answer")):
        columns["answer"] = _all_answers(example)
    return columns


def says_nothing(value: Any) -> bool:
    """Whether a cell holds no answer: it is blank, NaN, or a list of nothing else."""
    if isinstance(value, list | tuple):
        return all(map(says_nothing, value))
    return blank(value) or value != value


def _all_answers(example: Example) -> Any:
    """The reference or, where a list of answers begins with it, the list."""
    for name in ANSWERS:
        try:
            found = answers_in(example.columns.get(name))
        except (DropRow, InputError):  # not what the reference is from
            continue
        if len(found) > 1 and final_answer(as_written(found[0])) == example.reference:
            return found
    return example.reference


def lacking(example: Example, rewards: Sequence[str]) -> str | None:
    """Why a row cannot be rewarded: which column it lacks for which reward; None if it can. Raises as `answers_in` and
    what a reward `refuses` by."""
    columns = columns_of(example)
    for name in rewards:
        reward = REWARDS[name]
        answers = answers_of if reward.checks else answers_in
        for column in reward.needs:
            value = columns.get(column)
            if not answers(value) if column == "answer" else says_nothing(value):
                return f"the reward {name} needs {column}"
        if reward.refuses:
            loaded(reward.refuses)(columns)
    return None
