"""Chats as text: the prompt that asks for an answer, and how the template sets an answer's turn.

Nothing about a template is assumed. A probe is rendered twice, as a question that asks for an answer and with the
answer; what stands around the answer is the turn that training, sampling and scoring use:

    render(question, add_generation_prompt=True) = asked
    render(question, answer)                     = asked + opening + answer + closing
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from zopro.errors import InputError

QUESTION, ANSWER, NEXT = "Which colour is a ripe plum?", "Plums are mostly purple.", "And a ripe lime?"

# Tried in this order. Rows have no reasoning, so where a template asks for an answer by opening a reasoning tag that
# its answered turns do not have, the answer's own place is the one without reasoning.
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"thinking": False})

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """What a chat template puts around an assistant's answer.

    opening: between the prompt that asks for an answer and the answer. closing: what ends the answer's turn.
    following: after an answer that the user's next message follows ("" where the template refuses it).
    trims: what of " \n" the template strips from an answer's beginning and end. parts: whether messages must hold lists
    of parts instead of text. options: keyword arguments of the template.
    problem: why an answer has no place of its own, or "".
    """

    opening: str = ""
    closing: str = ""
    following: str = ""
    trims: tuple[str, str] = ("", "")
    parts: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> str:
    """The chat as text that ends where the assistant's turn begins; without what encoding the text adds before it.

    Args:
        messages: passed to the template as they are (role, content, and tool_calls, name, ... where they have those).
        tools: JSON schemas of functions, passed to the template.

    Raises:
        InputError: the template refuses the messages (roles out of order, a system message it does not know).
    """
    text = render(tokenizer, turn_of(tokenizer), messages, tools, add_generation_prompt=True)
    return text.removeprefix(added_start(tokenizer))


def render_answered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: str, tools: Sequence[Any] | None = None
) -> str:
    """The chat with an assistant's answer at its end, as `render_prompt` renders it; raises as it does."""
    answered = [*messages, {"role": "assistant", "content": answer}]
    return render(tokenizer, turn_of(tokenizer), answered, tools).removeprefix(added_start(tokenizer))


def lost_message(messages: Sequence[Message], text: str) -> str | None:
    """The role of the first message of which a rendered prompt lacks a word, or None.

    Templates drop the reasoning of earlier answers on purpose, and may write a tool's result as JSON.
    """
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) or content.strip() in text or "</think>" in content:
            continue
        if any(word not in text for word in re.findall(r"\w+", content)):
            return str(message.get("role"))
    return None


_turns: weakref.WeakKeyDictionary[Any, tuple[Any, Turn]] = weakref.WeakKeyDictionary()


def turn_of(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """How the tokenizer's template sets an answer; nothing around it where there is no template.

    There is a `problem` where the template renders what it is given as nothing, refuses a question and its answer, or
    asks for an answer with text that an answered turn does not have, so that an answer has no place after it.
    """
    template = getattr(tokenizer, "chat_template", None)
    known = _turns.get(tokenizer)
    if known is None or known[0] != template:
        known = template, Turn() if template is None else _find_turn(tokenizer)
        _turns[tokenizer] = known
    return known[1]


def _find_turn(tokenizer: PreTrainedTokenizerBase) -> Turn:
    tried: list[tuple[int, int, Turn]] = []
    for parts in (False, True):
        for options in OPTIONS:
            fault, turn = _probe(tokenizer, Turn(parts=parts, options=options))
            if fault == _NONE:
                return turn
            tried.append((fault, len(tried), turn))
        if min(tried)[0] < _UNSEEN:
            break
    return min(tried)[2]


_NONE, _BORDER, _NO_PLACE, _UNSEEN = range(4)  # what is wrong with a way to render answers


def _probe(tokenizer: PreTrainedTokenizerBase, way: Turn) -> tuple[int, Turn]:
    """What stands around an answer that is rendered in a way (parts, options), and what is wrong with it."""
    texts = (("user", QUESTION), ("assistant", ANSWER), ("user", NEXT))
    question, answer, following = ({"role": role, "content": text} for role, text in texts)

    def without_place(reason: str) -> Turn:
        return replace(way, problem=f"the chat template {reason}, so that an answer has no place of its own")

    try:
        asked = render(tokenizer, way, [question], add_generation_prompt=True)
        answered = render(tokenizer, way, [question, answer])
        spaced = [{**answer, "content": space + ANSWER + space} for space in " \n"]
        around = [render(tokenizer, way, [question, message]).rpartition(ANSWER) for message in spaced]
    except InputError as error:
        return _UNSEEN, without_place(str(error).removeprefix("prompt: the chat template ").rstrip("."))
    if QUESTION not in asked or QUESTION not in answered or ANSWER not in answered:
        return _UNSEEN, without_place("renders the text of a message as nothing")
    before, _, closing = answered.rpartition(ANSWER)
    if not before.startswith(asked):
        lacking = asked[shared_length(asked, before) :]
        return _NO_PLACE, without_place(f"asks for an answer with {lacking!r}, which answered turns do not have")
    trims = (
        "".join(space for space, (left, _, _) in zip(" \n", around, strict=True) if left == before),
        "".join(space for space, (_, _, right) in zip(" \n", around, strict=True) if right == closing),
    )
    try:
        after = render(tokenizer, way, [question, answer, following]).rpartition(ANSWER)[2]
    except InputError:
        after = ""
    if not closing.strip():  # a last turn left open: what ends an earlier one stands before the next turn's beginning
        between, begins = after.partition(NEXT)[0], asked.partition(QUESTION)[0]
        closing = between[: len(between) - shared_length(between[::-1], begins[::-1])]
    turn = replace(way, opening=before[len(asked) :], closing=closing, following=after, trims=trims)
    ids, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, answered))
    closes = turn.opening.lstrip().startswith("</")  # the answer would have to close a tag before it begins
    return _BORDER if closes or whole[: len(ids)] != ids else _NONE, turn


def shared_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many characters two texts, or tokens two lists, share from the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def render(
    tokenizer: PreTrainedTokenizerBase,
    turn: Turn,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The template's own text of a chat; `InputError` where it refuses the messages."""
    chat = [_in_parts(message) if turn.parts else dict(message) for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(
            chat,
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **turn.options,
        )
    except Exception as error:  # templates raise whatever Jinja lets them
        roles, reason = [message.get("role") for message in messages], (str(error).splitlines() or [""])[0]
        raise InputError(f"prompt: the chat template refuses messages with roles {roles}: {reason}") from error
    return text


def _in_parts(message: Message) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else dict(message)


def added_start(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokens (BOS) that encoding puts before every text, as text."""
    return "".join(tokenizer.convert_ids_to_tokens(added(tokenizer)[0]))


def check_end(tokenizer: PreTrainedTokenizerBase, argument: str) -> None:
    """Raise InputError for a tokenizer that ends every text with tokens of its own (EOS), prompts too."""
    if end := added(tokenizer)[1]:
        raise InputError(
            f"{argument}: the tokenizer must not end every prompt with {' '.join(tokenizer.convert_ids_to_tokens(end))}, "
            "after which nothing is asked, as this one does. Set add_eos_token to false in its tokenizer_config.json."
        )


def added(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids that encoding adds before and after every text."""
    plain, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    if not plain:  # a vocabulary without the letter
        return ids, []
    start = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), 0)
    return ids[:start], ids[start + len(plain) :]
