"""What a task is: row formats found by their columns, each turning one row into one `Example`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from zopro.errors import InputError
from zopro.tasks.literals import spells_cut_messages, spells_messages
from zopro.tasks.rows import Row

Message = dict[str, Any]
"""One chat turn: {"role": "user", "content": text} and whatever else the row's message had (name, tool_calls, ...)."""

ASKING_ROLES = ("user", "tool", "function", "ipython")
"""Whose turn a prompt may end with: the assistant answers the user, or the tool that it called."""


class DropRow(Exception):
    """The row has the right columns but nothing to learn from; its text is the reason, which loading counts."""


@dataclass(frozen=True)
class Example:
    """One row as every stage sees it.

    prompt: chat messages that end with the user's turn (or a tool's). chosen: the (better) answer, or None where there
    is none to learn from. rejected: the worse answer, or None where rows are scored instead of paired. score: direct
    assessment of `chosen`, or None. reference: what metrics and rewards compare answers with, or None. row: number of the
    row in its file, from 1. tools: what the chat template is given as `tools`, or None. notes: what a reader would not
    expect of how the row was read; loading counts them. columns: those of the row, for reward functions, where loading
    was asked to keep them.
    """

    prompt: list[Message]
    chosen: str | None
    rejected: str | None = None
    score: float | None = None
    reference: str | None = None
    row: int = 0
    tools: list[Any] | None = None
    notes: tuple[str, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> str:
        """What the last message says."""
        return str(self.prompt[-1].get("content") or "")


@dataclass(frozen=True)
class Format:
    """One shape of row: `columns` are groups of names, of each of which a row must have at least one."""

    columns: tuple[tuple[str, ...], ...]
    convert: Callable[[Row], Example]

    def matches(self, names: Collection[str]) -> bool:
        return all(any(name in names for name in group) for group in self.columns)

    def __str__(self) -> str:
        return "(" + ", ".join(" or ".join(group) for group in self.columns) + ")"


@dataclass(frozen=True)
class Task:
    """A task: its row formats (the first that matches wins) and how its answers are compared and rewarded.

    default_judge: what `judge: auto` means. metric: a name in `zopro.tasks.metrics.METRICS`, or None.
    reward: pairwise (chosen against rejected) or regression (on `Example.score`).
    """

    name: str
    formats: tuple[Format, ...]
    default_judge: str
    metric: str | None = None
    reward: Literal["pairwise", "regression"] = "pairwise"


def columns(*names: str) -> tuple[tuple[str, ...], ...]:
    """Column groups from names; "a|b" is a group of alternatives."""
    return tuple(tuple(name.split("|")) for name in names)


def first(row: Mapping[str, Any], *names: str) -> str:
    """The first of the names that is a column of `row`; a column that is not null goes before one that is."""
    present = [name for name in names if name in row]
    return next((name for name in present if row[name] is not None), present[0])


def as_text(value: Any, column: str) -> str:
    """`value` stripped. Raises as `whole_text`, and for messages written as text, which are no text to learn from:
    `InputError`, or `DropRow` where their end is missing."""
    text = whole_text(value, column)
    if spells_messages(text):
        raise InputError(f"{column}: must be text, got messages written as text")
    if spells_cut_messages(text):
        raise DropRow(f"{column} is messages written as text, cut off")
    return text.strip()


def whole_text(value: Any, column: str) -> str:
    """`value` as it is. Raises `DropRow` if it is null and `InputError` if it is not text, or half a character."""
    if value is None:
        raise DropRow(f"{column} is null")
    if not isinstance(value, str):
        raise InputError(f"{column}: must be text, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{column}: must be text, got a lone surrogate at character {error.start + 1}") from None
    return value


def as_number(value: Any, column: str) -> float:
    """`value` as a finite number, also from text (CSV). Raises `DropRow` (null, blank, not finite) or `InputError`."""
    if value is None or (isinstance(value, str) and not value.strip()):  # CSV has no null
        raise DropRow(f"{column} is null")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    except (TypeError, ValueError):
        raise InputError(f"{column}: must be a number, got {value!r:.60}") from None
    if not math.isfinite(number):
        raise DropRow(f"{column} is not finite")
    return number


def pick(answers: Sequence[str], winner: Any, column: str) -> tuple[str, str]:
    """(chosen, rejected) of two answers, by the index in `column`; any other index says that nobody won."""
    index = as_number(winner, column)
    if index not in (0, 1):
        raise DropRow(f"{column} names no winner")
    return answers[int(index)], answers[1 - int(index)]


def make_example(
    prompt: list[Message],
    chosen: str | None,
    rejected: str | None = None,
    score: float | None = None,
    reference: str | None = None,
) -> Example:
    """An `Example`. Raises `DropRow` for an empty prompt or answer and for equal answers, white space aside."""
    if not prompt or (prompt[-1]["role"] == "user" and not prompt[-1].get("content", "").strip()):
        raise DropRow("empty prompt")
    if prompt[-1]["role"] not in ASKING_ROLES:
        raise DropRow("the prompt does not end with the user's turn or a tool's")
    if all(message["role"] != "user" for message in prompt):
        raise DropRow("the prompt has no turn of the user")
    if any(answer is not None and not answer.strip() for answer in (chosen, rejected)):
        raise DropRow("empty answer")
    if chosen is not None and rejected is not None and chosen.strip() == rejected.strip():
        raise DropRow("chosen and rejected are equal")
    return Example(prompt, chosen, rejected, score, reference or None)


def ask(text: str) -> list[Message]:
    """A one-turn conversation."""
    return [{"role": "user", "content": text.strip()}]
