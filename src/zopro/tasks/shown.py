"""Whether a chat template shows what a row holds: many leave out tools, calls, or the turns of roles they do not know.

A template says nothing when it leaves something out, so it is asked: a part is shown if the text differs without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from zopro.errors import InputError
from zopro.tasks.base import DropRow, Example, Message
from zopro.tasks.dialogue import joined
from zopro.tasks.messages import CALLS

Render = Callable[[list[Message], list[Any] | None], str]
"""A chat template: (messages, tools) -> text. Raises `InputError` for messages that it refuses."""

JOINED = "turns of one speaker joined, for the chat template takes them in turn only"
_COMMON_ROLES = ("system", "user", "assistant")
_CONTENT_KEYS = ("tools", "functions", "documents")  # of a message, in some data sets


class Fit:
    """Example -> the example as the template takes it: as it is or, if it is refused so, with joined turns.

    Raises `DropRow` for tools, calls and turns that the template leaves out or does not know, and `InputError` for
    other messages that it refuses.
    """

    def __init__(self, render: Render) -> None:
        self.render = render
        self._plain: dict[tuple[str, ...], str | None] = {}  # roles of plain turns -> the role left out

    def __call__(self, example: Example) -> Example:
        messages, tools = example.prompt, example.tools
        plain = tools is None and all(message.keys() == {"role", "content"} for message in messages)
        if plain and len(messages) == 1:
            return example
        try:
            text = self.render(messages, tools)
        except InputError:
            together = joined(messages)
            if together == messages:
                _raise_if_unknown(messages, tools)
                raise
            return self(replace(example, prompt=together, notes=(*example.notes, JOINED)))
        if plain:  # such turns differ in their roles alone, so that one answer is good for all
            roles = tuple(message["role"] for message in messages)
            if roles not in self._plain:
                self._plain[roles] = self._left_out(messages, tools, text)
            left_out = self._plain[roles]
        else:
            left_out = self._left_out(messages, tools, text)
        keys = self._keys_left_out(messages, tools, text)
        left_out = left_out or next((key for key in keys if key in _CONTENT_KEYS), None)
        if left_out:
            raise DropRow(f"the chat template leaves out {left_out}")
        note = f"keys of messages that the chat template does not show: {', '.join(keys)}"
        return replace(example, notes=(*example.notes, note)) if keys else example

    def _left_out(self, messages: list[Message], tools: list[Any] | None, text: str) -> str | None:
        if tools and self._rendered(messages, None) == text:
            return "tools"
        if any(map(_calls, messages)) and self._rendered([_without(m, *CALLS) for m in messages], tools) == text:
            return "calls of tools"
        # Every content is replaced by a mark of its own. What stands beside calls is left to the template.
        marks = {n: f"Mark{n}kraM" for n, m in enumerate(messages) if m.get("content", "").strip() and not _calls(m)}
        marked = [{**m, "content": marks[n]} if n in marks else m for n, m in enumerate(messages)]
        shown = self._rendered(marked, tools)
        lost = next((n for n, mark in marks.items() if shown is not None and mark not in shown), None)
        return None if lost is None else f"turns of the role {messages[lost]['role']}"

    def _keys_left_out(self, messages: list[Message], tools: list[Any] | None, text: str) -> list[str]:
        keys = sorted({key for message in messages for key in message} - {"role", "content", *CALLS})
        return [key for key in keys if self._rendered([_without(m, key) for m in messages], tools) == text]

    def _rendered(self, messages: list[Message], tools: list[Any] | None) -> str | None:
        try:
            return self.render(messages, tools)
        except InputError:
            return None


def _raise_if_unknown(messages: list[Message], tools: list[Any] | None) -> None:
    if tools or any(map(_calls, messages)):
        raise DropRow("the chat template refuses tools or calls") from None
    for role in (message["role"] for message in messages if message["role"] not in _COMMON_ROLES):
        raise DropRow(f"the chat template refuses turns of the role {role}") from None


def _calls(message: Message) -> bool:
    return any(message.get(name) for name in CALLS)


def _without(message: Message, *keys: str) -> Message:
    return {key: value for key, value in message.items() if key not in keys}
