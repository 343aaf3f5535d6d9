"""Conversational assistants: which of two answers to a conversation people preferred.

Formats: pairs under any of the names in `PAIRS`, PKU-SafeRLHF, SHP and arenas (two conversations and a winner).
PKU-SafeRLHF judges help and harm apart: `better_response_id` (help) is used where it is there, else
`safer_response_id`; rename the columns for the other choice.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from zopro.tasks.base import DropRow, Example, Format, Task, as_number, as_text, ask, columns, first, make_example, pick
from zopro.tasks.dialogue import as_messages
from zopro.tasks.pairs import from_messages, from_pair, with_system
from zopro.tasks.rows import Row

PAIRS = (
    ("chosen", "rejected"),  # hh-rlhf, TRL's preference format and most others
    ("chosen_response", "rejected_response"),
    ("accepted", "rejected"),
    ("response_j", "response_k"),  # stack-exchange-paired
    ("pos_resp", "neg_resp"),  # cvalues
)
"""Names under which data sets keep the better and the worse answer."""


def from_safe_rlhf(row: Row) -> Example:
    winner = first(row, "better_response_id", "safer_response_id")
    answers = [as_text(row[name], name) for name in ("response_0", "response_1")]
    prompt = with_system(row, as_messages(row["prompt"], "prompt", "user"))
    return make_example(prompt, *pick(answers, row[winner], winner))


def from_shp(row: Row) -> Example:
    answers = [as_text(row[name], name) for name in ("human_ref_A", "human_ref_B")]
    # labels: 1 if A was preferred, 0 if B was (SHP's data card).
    winner = 1 - as_number(row["labels"], "labels")
    return make_example(with_system(row, ask(as_text(row["history"], "history"))), *pick(answers, winner, "labels"))


def from_arena(row: Row) -> Example:
    """lmsys/chatbot_arena_conversations; a tie names no winner."""
    a, b = (as_messages(row[name], name, "assistant") for name in ("conversation_a", "conversation_b"))
    winner = as_text(row["winner"], "winner")
    if winner not in ("model_a", "model_b"):
        raise DropRow("winner names no winner")
    return from_messages(row, *((a, b) if winner == "model_a" else (b, a)))


@cache
def formats(implicit: bool) -> tuple[Format, ...]:
    """Every shape of a row with two answers; `implicit` as in `from_pair`."""
    return (
        *(Format(columns(*pair), partial(from_pair, answers=pair, implicit=implicit)) for pair in PAIRS),
        Format(columns("prompt", "response_0", "response_1", "better_response_id|safer_response_id"), from_safe_rlhf),
        Format(columns("history", "human_ref_A", "human_ref_B", "labels"), from_shp),
        Format(columns("conversation_a", "conversation_b", "winner"), from_arena),
    )


def task(options: Any) -> Task:
    """The chat task; a model judges its pairs unless told otherwise, for there is no reference to measure against."""
    return Task("chat", formats(implicit=False), default_judge="model")
