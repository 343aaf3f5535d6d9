r"""Dialogues as chat messages: hh-rlhf's "\n\nHuman: ...\n\nAssistant: ..." text, lists of messages, or plain text.

In a dialogue text, consecutive turns of one speaker are one turn with a blank line in it. Lists of messages stay as
they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from zopro.tasks.base import DropRow, Message, as_text
from zopro.tasks.literals import spells_texts
from zopro.tasks.messages import message_list

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_RENDERED = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|user|assistant|system)\|>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>"
)
_TURN = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):")
_WITHOUT_BLANK_LINES = re.compile(r"\n\s*(?:Human|Assistant):")


def parse_dialogue(text: str) -> list[Message] | None:
    r"""Messages of a "\n\nHuman: ...\n\nAssistant: ..." text, contents stripped; None if it does not begin with one.

    >>> parse_dialogue("\n\nHuman: Hi\n\nAssistant: Hello.")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello.'}]
    """
    before, *turns = _TURN.split(text)
    if before.strip() or not turns:
        return None
    spoken = zip(turns[::2], turns[1::2], strict=True)
    return joined([{"role": _SPEAKERS[speaker], "content": said.strip()} for speaker, said in spoken])


def as_messages(value: Any, column: str, role: str) -> list[Message]:
    """`value` as messages: a list of them, a dialogue text, or plain text, which is one turn of `role`.

    Raises `DropRow` for null, for an unknown role, for what is not text, and for a dialogue all of whose turns would be
    one; `InputError` for another type.
    """
    messages = message_list(value, column)
    if messages is not None:
        return messages
    text = as_text(value, column)
    if role == "user" and spells_texts(text):
        raise DropRow(f"{column} is a list of texts, not of messages")
    if _RENDERED.search(text):
        raise DropRow(f"{column} has a chat template's marks in it already")
    dialogue = parse_dialogue(text)
    if dialogue is not None and len(dialogue) == 1 and _WITHOUT_BLANK_LINES.search(dialogue[0]["content"]):
        raise DropRow(f"{column} is a conversation without blank lines between its turns")
    return dialogue or [{"role": role, "content": text}]


def joined(messages: Sequence[Message]) -> list[Message]:
    """`messages` with consecutive plain turns of one speaker as one, a blank line between them."""
    result: list[Message] = []
    for message in messages:
        if result and _plain(message) and _plain(result[-1]) and result[-1]["role"] == message["role"]:
            content = f"{result[-1]['content']}\n\n{message['content']}".strip()
            result[-1] = {"role": message["role"], "content": content}
        else:
            result.append(message)
    return result


def _plain(message: Message) -> bool:
    return message.keys() == {"role", "content"} and message["role"] in ("system", "user", "assistant")
