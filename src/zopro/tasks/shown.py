"""Whether a chat template shows what a row holds: many leave out tools, calls, or the turns of roles they do not know.

A template says nothing when it leaves something out, so it is asked: a part is shown if the text differs without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from zopro.errors import InputError
from zopro.tasks.base import DropRow, Example, Message
from zopro.tasks.dialogue import joined

Render = Callable[[list[Message], list[Any] | None], str]
"""A chat template: (messages, tools) -> text. Raises `InputError` for messages that it refuses."""

JOINED = "turns of one speaker joined, for the chat template takes them in turn only"
_COMMON_ROLES = ("system", "user", "assistant")
_CALLS = ("tool_calls", "function_call")
_CONTENT_KEYS = ("tools", "functions", "documents")  # of a message, in some data sets


def fitted(example: Example, render: Render) -> Example:
    """`example` as the template takes it: as it is or, if it is refused so, with the turns of one speaker joined.

    Raises `DropRow` for tools, calls and turns that the template leaves out or does not know, and `InputError` for
    other messages that it refuses.
    """
    messages, tools = example.prompt, example.tools
    if len(messages) == 1 and messages[0].keys() == {"role", "content"} and tools is None:
        return example
    try:
        text = render(messages, tools)
    except InputError:
        if tools or any(map(_calls, messages)):
            raise DropRow("the chat template refuses tools or calls") from None
        for role in (message["role"] for message in messages if message["role"] not in _COMMON_ROLES):
            raise DropRow(f"the chat template refuses turns of the role {role}") from None
        if (together := joined(messages)) == messages:
            raise
        return fitted(replace(example, prompt=together, notes=(*example.notes, JOINED)), render)
    for part in _left_out(messages, tools, text, render):
        raise DropRow(f"the chat template leaves out {part}")
    keys = _keys_left_out(messages, tools, text, render)
    for key in keys:
        if key in _CONTENT_KEYS:
            raise DropRow(f"the chat template leaves out {key}")
    if keys:
        note = f"keys of messages that the chat template does not show: {', '.join(keys)}"
        return replace(example, notes=(*example.notes, note))
    return example


def _left_out(messages: list[Message], tools: list[Any] | None, text: str, render: Render) -> Iterator[str]:
    if tools and _rendered(messages, None, render) == text:
        yield "tools"
    calling = [message for message in messages if _calls(message)]
    if calling:
        without = [{k: v for k, v in m.items() if k not in _CALLS} for m in messages]
        if _rendered(without, tools, render) == text:
            yield "calls of tools"
    marks = {
        f"Mark{number}kraM": message["role"]
        for number, message in enumerate(messages)
        if message.get("content", "").strip() and message not in calling
    }
    marked = [
        {**m, "content": f"Mark{number}kraM"} if f"Mark{number}kraM" in marks else m for number, m in enumerate(messages)
    ]
    shown = _rendered(marked, tools, render)
    yield from (f"turns of the role {role}" for mark, role in marks.items() if shown is not None and mark not in shown)


def _keys_left_out(messages: list[Message], tools: list[Any] | None, text: str, render: Render) -> list[str]:
    keys = sorted({key for message in messages for key in message} - {"role", "content", *_CALLS})
    without = {key: [{k: v for k, v in m.items() if k != key} for m in messages] for key in keys}
    return [key for key in keys if _rendered(without[key], tools, render) == text]


def _calls(message: Message) -> bool:
    return any(message.get(name) for name in _CALLS)


def _rendered(messages: list[Message], tools: list[Any] | None, render: Render) -> str | None:
    try:
        return render(messages, tools)
    except InputError:
        return None
