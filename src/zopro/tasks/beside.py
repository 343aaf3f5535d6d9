"""What stands beside a row's prompt and answers: tools, which go to the chat template, and what cannot be used.

It is asked of every row of every task, after its format has read it: no format can forget it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zopro.errors import InputError
from zopro.tasks.base import DropRow, Example
from zopro.tasks.literals import blank, spelled
from zopro.tasks.messages import MEDIA
from zopro.tasks.rows import Row

UNUSED = {
    **dict.fromkeys(MEDIA, "a text model cannot see or hear it"),
    **dict.fromkeys(("prompt", "question", "query", "instruction"), "rows of this form have their prompt elsewhere"),
    "tool_calls": "calls are read from messages only",
    "function_call": "calls are read from messages only",
    "functions": "functions are read from the column tools only",
    "history": "earlier turns are read from a list of messages only",
    "chat_template_kwargs": "the chat template is given messages and tools only",
}
"""Columns that carry content which is not used, and why; some formats read some of them."""


def with_tools(example: Example, row: Row) -> Example:
    """`example` with the row's tools. Raises `DropRow` for other content that no format reads, `InputError` for tools
    that are no list."""
    for name, reason in UNUSED.items():
        if name in row and name not in row.read and not _empty(row[name]):
            raise DropRow(f"{name}: {reason}")
    tools = tools_of(row.get("tools"))
    return example if tools is None else replace(example, tools=tools)


def unread(row: Row) -> list[str]:
    """The columns of `row` that say something and were not read."""
    return [name for name, value in row.items() if name not in row.read and not blank(value)]


def tools_of(value: Any) -> list[Any] | None:
    """What the column `tools` says, a list or its text; None for nothing. Raises `InputError` for what is no list."""
    if _empty(value):
        return None
    try:
        value = spelled(value) if isinstance(value, str) else value
        value = [spelled(tool) if isinstance(tool, str) else tool for tool in value] if isinstance(value, list) else None
    except ValueError:
        value = None
    if value is None or not all(isinstance(tool, Mapping) for tool in value):
        raise InputError("tools: must be a list of JSON schemas, or such a list as text")
    return [{key: entry for key, entry in tool.items() if entry is not None} for tool in value]


def _empty(value: Any) -> bool:
    return blank(value) or (isinstance(value, list) and all(entry is None for entry in value))
