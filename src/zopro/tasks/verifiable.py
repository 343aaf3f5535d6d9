"""Prompts whose answers a program checks: mathematics, countdowns, anything that a reward function can tell.

A row has a prompt (text or messages, with a system message, earlier turns and tool messages as they are) and, for most
rewards, an answer. GSM8K's worked solutions ("... #### 42"), MATH's boxed ones and countdowns (`nums`, `target`) are
read; rows with a prompt alone serve rewards that need no answer. A reward function gets all columns of the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zopro.errors import InputError
from zopro.tasks.base import DropRow, Example, Format, Message, Task, ask, columns, make_example
from zopro.tasks.beside import UNUSED
from zopro.tasks.columns import ANSWERS, says_nothing
from zopro.tasks.dialogue import as_messages
from zopro.tasks.literals import blank, spelled, spells_texts
from zopro.tasks.pairs import PROMPTS, prompt_of, with_system
from zopro.tasks.rows import Row
from zopro.tasks.solutions import as_written, final_answer, numbers_of

ASKED = ("prompt", "problem", *PROMPTS[1:])
"""Columns that may hold the prompt."""
TAKEN = "the assistant's turn at the end of the prompt is taken for its answer"
LEFT = "the assistant's turn at the end of the prompt is left out: the row has an answer"
SOLUTIONS = ("solution", "answer", "completion")
"""Columns that supervised fine-tuning may learn from, as far as they are text."""


def countdown_prompt(nums: list[int], target: Any) -> str:
    """How a countdown is put that comes without a prompt."""
    return (
        f"Using the numbers {', '.join(map(str, nums))}, write an equation that equals {target}. Use each number exactly "
        "once, with +, -, *, / and brackets. End your answer with the equation."
    )


def from_prompt(row: Row) -> Example:
    """The example of a row with a prompt."""
    prompt = prompt_of(row, (), ASKED)
    solution = None
    if prompt and prompt[-1]["role"] == "assistant":  # a whole conversation: its end is an answer
        solution, prompt = str(prompt[-1].get("content", "")), prompt[:-1]
    example = _with_answer(row, prompt, solution)
    if solution is None or blank(row.get("prompt")):  # messages may well be a whole conversation
        return example
    answered = any(name in row and not says_nothing(row[name]) for name in ANSWERS)
    return replace(example, notes=(*example.notes, LEFT if answered else TAKEN))


def from_countdown(row: Row) -> Example:
    """The example of a row with `nums` and `target`; its prompt, if it has one, is taken as it is.

    One with a prompt whose numbers are null is none of the countdowns of its table.
    """
    asked = any(not blank(row[name]) for name in ASKED if name in row)
    lacks = [name for name in ("nums", "target") if says_nothing(row[name])]
    if lacks and not asked:
        raise DropRow(f"{lacks[0]} is null")
    nums, target = ([], 0) if lacks else numbers_of(row["nums"], row["target"])
    if asked:
        return from_prompt(row)
    return _with_answer(row, ask(countdown_prompt(nums, target)), None)


def _with_answer(row: Row, prompt: list[Message], solution: str | None) -> Example:
    answers = [row[name] for name in ANSWERS if name in row and not says_nothing(row[name])]
    texts = [text for name in SOLUTIONS if (text := _text(row, name)) is not None]
    solution = next(iter(texts), solution)
    given = answers[0] if answers else solution
    row.read.update(row.keys() - UNUSED.keys())  # all of them reach the reward
    example = make_example(with_system(row, prompt), solution)
    return replace(example, reference=_reference(given))


def _reference(answer: Any) -> str | None:
    """The answer as text; of several the first one, of messages the last one's."""
    text = _text({"answer": answer}, "answer")
    return final_answer(text) or None if text is not None else None


def _text(row: Mapping[str, Any], name: str) -> str | None:
    """What a column says, of messages the last one and of a list the first that says something; None where it is no
    text."""
    value = row.get(name)
    if isinstance(value, str) and spells_texts(value):
        value = spelled(value)
    if isinstance(value, list) and value and not isinstance(value[0], Mapping):
        value = next((one for one in value if not says_nothing(one)), None)
    if says_nothing(value) or isinstance(value, bool):
        return None
    try:
        if isinstance(value, int | float):
            return as_written(value)
        return str(as_messages(value, name, "assistant")[-1].get("content") or "") or None
    except (DropRow, InputError):
        return None


FORMATS = (
    Format(columns("nums", "target"), from_countdown),
    Format(columns("|".join(ASKED)), from_prompt),
)


def task(options: Any) -> Task:
    """The verifiable task. Nobody judges pairs of it unless a reward model is trained too."""
    return Task("verifiable", FORMATS, default_judge="model")
