"""Chat messages as rows hold them, made uniform: role and content, other keys kept, nothing of the text changed.

Read are lists of {"role", "content"} or {"from", "value"} (human and gpt are user and assistant), one such object, an
object of lists (how Arrow stores a sequence of records), and any of these as text. Contents made of parts are joined if
all parts are text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zopro.errors import InputError
from zopro.tasks.base import DropRow, Message, whole_text
from zopro.tasks.literals import blank, parsed, spelled, spells_messages

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_ALIASES = {"human": "user", "gpt": "assistant"}
_KEYS = (("role", "content"), ("from", "value"))
CALLS = ("tool_calls", "function_call")
"""Keys of a message that calls tools."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Names of columns and keys that hold what a text model cannot see or hear."""
_TEXT_PARTS = ("text", "input_text", "output_text")


def message_list(value: Any, column: str) -> list[Message] | None:
    """`value` as messages, or None if it is no list of messages in any form.

    Raises `DropRow` for a message that is null, of an unknown role or not text, and `InputError` for one that must be
    fixed.
    """
    if isinstance(value, str) and spells_messages(value):
        value = parsed(value, column)
    if isinstance(value, Mapping) and any(role in value for role, _ in _KEYS):
        value = _records(value, column)
    if not isinstance(value, list):
        return None
    return [_message(turn, column) for turn in value]


def _records(value: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    if not any(isinstance(value.get(role), list) for role, _ in _KEYS):
        return [value]
    lists = [entry for entry in value.values() if entry is not None]
    if not all(isinstance(entry, list) and len(entry) == len(lists[0]) for entry in lists):
        raise InputError(f"{column}: its lists of {', '.join(value)} must be of one length")
    names = [name for name, entry in value.items() if entry is not None]
    return [dict(zip(names, values, strict=True)) for values in zip(*lists, strict=True)]


def _message(turn: Any, column: str) -> Message:
    given = dict(turn) if isinstance(turn, Mapping) else {}
    keys = next((pair for pair in _KEYS if pair[0] in given), None)
    if keys is None or (keys[1] not in given and not any(given.get(name) for name in CALLS)):
        raise InputError(f"{column}: each message must have role and content (or from and value), got {turn!r:.80}")
    role = whole_text(given.pop(keys[0]), f"{column}.role").strip()
    content = given.pop(keys[1], None)
    message: Message = {"role": _ALIASES.get(role, role)}
    if message["role"] not in ROLES:
        raise DropRow(f"unknown role {role!r:.40}")
    for name, entry in given.items():
        if name in MEDIA and not blank(entry):
            raise DropRow(f"{name} of a message: a text model cannot see or hear it")
        if (entry := _calls(entry, column) if name in CALLS else entry) is not None:
            message[name] = _checked(entry, column)
    if content is not None or not any(message.get(name) for name in CALLS):
        message["content"] = _content(content, f"{column}.content")
    return message


def _content(content: Any, column: str) -> str:
    if not isinstance(content, list):
        return whole_text(content, column)
    return "".join(_part(part, column) for part in content)


def _part(part: Any, column: str) -> str:
    if not isinstance(part, Mapping):
        raise InputError(f"{column}: must be text or a list of parts with a type, got {part!r:.60}")
    kind = part.get("type") or "text"
    if kind not in _TEXT_PARTS:
        raise DropRow(f"content of type {kind!r:.40} is not text")
    return whole_text(part.get("text"), f"{column}.text")


def _calls(value: Any, column: str) -> Any:
    """Calls as a template reads them: a text is JSON here, over whose letters it would loop."""
    if not isinstance(value, str):
        return value
    try:
        return spelled(value) if value.strip() else None
    except ValueError as error:
        raise InputError(f"{column}.tool_calls: must be a list of calls, got text that is {error}") from None


def _checked(value: Any, column: str) -> Any:
    """`value`, every text in which is whole. Raises as `whole_text` does."""
    for entry in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        _checked(entry, column)
    return whole_text(value, column) if isinstance(value, str) else value
