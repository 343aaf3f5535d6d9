"""Pairs of answers and the prompt they answer, from whichever columns hold them.

The prompt stands in a column of its own (`PROMPTS`), or chosen and rejected are whole conversations that share all but
the last turn. It is never guessed: rows that give it twice must give the same one, and rows that name it otherwise are
left out with the names that are known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from zopro.tasks.base import DropRow, Example, Message, as_text, ask, make_example
from zopro.tasks.dialogue import as_messages
from zopro.tasks.literals import blank
from zopro.tasks.rows import Row

PROMPTS = (
    "prompt", "question", "query", "instruction", "messages", "conversations", "conversation", "input", "context",
)  # fmt: skip
"""Columns that may hold the prompt; the first that is there and not blank does, and others must repeat it."""

_LISTS = ("messages", "conversations", "conversation")

SYSTEMS = ("system", "system_prompt", "system_message")
"""Columns that hold the system message."""

ANSWER_KEYS = ("tool_calls", "function_call", "thinking", "reasoning", "reasoning_content", "audio", "refusal")
"""Keys of an answer's message that are part of the answer beside its text."""

_LABELS = re.compile(
    r"(.*_)?(id|ids|idx|index|uuid|uid|hash|source|dataset|subset|split|model|lang|language|category|url|license|date)"
)
"""Columns whose text says where a row is from, and so is no prompt."""


_MARKED = re.compile(
    r"^[^\w\n]*(?:human|user|assistant|system|instruction|response|ai|bot)\W*:", re.IGNORECASE | re.MULTILINE
)
"""How turns begin in texts that are conversations, though not in a way that is read here."""

IMPLICIT = "the prompt is what chosen and rejected begin with (TRL's implicit prompt)"


def from_pair(row: Row, answers: tuple[str, str] = ("chosen", "rejected"), implicit: bool = False) -> Example:
    """The example of a row whose two answers stand in the columns `answers`.

    implicit: read TRL's standard format with an implicit prompt too, two plain texts that begin alike.
    Raises `DropRow` where no prompt is to be found or two differ, and where an answer is more than one turn of text.
    """
    if implicit and _begin_with_prompt(row, answers):
        return _from_shared_start(*(row[name] for name in answers))
    chosen, rejected = (as_messages(row[name], name, "assistant") for name in answers)
    return from_messages(row, chosen, rejected)


def from_messages(row: Row, chosen: list[Message], rejected: list[Message]) -> Example:
    """`from_pair` of answers, or conversations that end with them, that are messages already."""
    if chosen == rejected:
        raise DropRow("chosen and rejected are equal")
    if not chosen or not rejected:
        raise DropRow("empty answer")
    answers = [chosen[-1], rejected[-1]]
    if chosen[0]["role"] != "assistant" or any(message["role"] == "user" for message in chosen):
        if _bare(chosen[:-1]) != _bare(rejected[:-1]):
            raise DropRow("chosen and rejected answer different prompts")
        prompt = _agreed(row, chosen[:-1], answers)
    else:
        prompt = prompt_of(row, answers)
        if len(chosen) > 1 or len(rejected) > 1:
            raise DropRow("the answer has several turns")
    if prompt and prompt[0]["role"] == "assistant":
        raise DropRow("the assistant speaks first")
    example = make_example(with_system(row, prompt), _answer(answers[0]), _answer(answers[1]))
    unread = sorted({key for message in answers for key in message} - {"role", "content"})
    return replace(example, notes=(f"keys of the answer's message not read: {', '.join(unread)}",)) if unread else example


def with_system(row: Row, prompt: list[Message]) -> list[Message]:
    """`prompt` after the row's system message, if a column of `SYSTEMS` has one. Raises `DropRow` if two differ."""
    texts = {as_text(row[name], name) for name in SYSTEMS if not blank(row.get(name))}
    own = next((message for message in prompt if message["role"] in ("system", "developer")), None)
    if own is not None:
        texts = {text for text in texts if text.split() != own.get("content", "").split()}
    if len(texts) > (own is None):
        raise DropRow("two system messages differ")
    return [*({"role": "system", "content": text} for text in texts), *prompt]


def _answer(message: Message) -> str:
    if message["role"] != "assistant":
        raise DropRow("the last turn is not the assistant's")
    for key in ANSWER_KEYS:
        if not blank(message.get(key)):
            raise DropRow(f"the answer has {key}, which is not text")
    return str(message["content"])


def prompt_of(row: Row, answers: Sequence[Message], known: Sequence[str] = PROMPTS) -> list[Message]:
    """The prompt of answers that stand alone, from the columns that are `known` to hold one.

    Raises `DropRow` where there is none, or two differ.
    """
    names = [name for name in known if name in row]
    given = {name: row[name] for name in names if not blank(row[name])}
    if not names:
        raise DropRow(f"no prompt: the columns are {', '.join(row)}; known are {', '.join(known)}")
    if not given:
        raise DropRow(f"{names[0]} is null" if row[names[0]] is None else "empty prompt")
    if "prompt" not in given and {"instruction", "input"} <= given.keys():  # as in Alpaca
        texts = [as_text(given.pop(name), name) for name in ("instruction", "input")]
        given = {"instruction": "\n\n".join(texts)} | given
    asked = {name: _without_answer(as_messages(value, name, "user"), answers) for name, value in given.items()}
    (first, prompt), *others = asked.items()
    for other, messages in others:
        if _within(prompt, messages):
            prompt = messages
        elif not _within(messages, prompt) and not _quoted(messages, prompt):
            raise DropRow(f"{first} and {other} differ: which one is the prompt?")
    return prompt


def _agreed(row: Row, prompt: list[Message], answers: Sequence[Message]) -> list[Message]:
    """The prompt of whole conversations, which every column that may hold one must repeat a part of.

    Lists of the names in `_LISTS` need not: many data sets keep a conversation once more, in a form of their own.
    """
    for name, value in row.items():
        if name not in PROMPTS or blank(value) or (name in _LISTS and not isinstance(value, str)):
            continue
        given = _without_answer(as_messages(row[name], name, "user"), answers)
        if _within(given, [*prompt, *answers]) or _quoted(given, prompt):
            continue
        if not _within(prompt, given):
            raise DropRow(f"{name} is not what the conversation asks")
        prompt = given
    return prompt


def _without_answer(prompt: list[Message], answers: Sequence[Message]) -> list[Message]:
    """`prompt` without the cue "Assistant:", which the chat template gives, and without an answer that is repeated."""
    cue: Message = {"role": "assistant", "content": ""}
    return prompt[:-1] if prompt and any(_bare(prompt[-1:]) == _bare([end]) for end in (cue, *answers)) else prompt


def _bare(messages: Sequence[Message]) -> list[tuple[Any, ...]]:
    """What two prompts are compared by: roles, contents without runs of white space, calls."""
    return [(m["role"], " ".join(m.get("content", "").split()), m.get("tool_calls")) for m in messages]


def _within(part: Sequence[Message], whole: Sequence[Message]) -> bool:
    """Whether the turns of `part` stand in `whole` one after another."""
    turns, others = _bare(part), _bare(whole)
    return any(turns == others[i : i + len(turns)] for i in range(len(others) - len(turns) + 1))


def _quoted(part: Sequence[Message], whole: Sequence[Message]) -> bool:
    """Whether `part` is a single text that stands inside a turn of `whole`."""
    return len(part) == 1 and any(_bare(part)[0][1] in content for _, content, _ in _bare(whole))


def _begin_with_prompt(row: Row, answers: tuple[str, str]) -> bool:
    """Whether two plain texts are all that could hold the prompt."""
    for name, value in row.items():
        if name in answers:
            if not isinstance(value, str) or as_messages(value, name, "plain")[0]["role"] != "plain":
                return False
        elif name in PROMPTS or not (isinstance(value, int | float) or blank(value) or _LABELS.fullmatch(name)):
            return False
    return True


def _from_shared_start(*answers: str) -> Example:
    """The prompt is what the texts share, as in `trl.extract_prompt`, but cut at a space so that no word is split
    between prompt and answer ("blue" against "black" share a "b")."""
    chosen, rejected = (text.strip() for text in answers)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    while same and not chosen[same - 1].isspace():
        same -= 1
    shared = chosen[:same]
    if _MARKED.search(shared):
        raise DropRow("no prompt: chosen and rejected are conversations in a form that is not known")
    example = make_example(ask(shared), chosen[len(shared) :].strip(), rejected[len(shared) :].strip())
    return replace(example, notes=(IMPLICIT,))
