"""Chats as text: the tokenizer, the prompt that asks for an answer, and how the template sets an answer's turn.

Nothing about a template is assumed. A probe is rendered twice, as a question that asks for an answer and with the
answer; what stands around the answer is the turn that training, sampling and scoring use:

    render(question, add_generation_prompt=True) = asked
    render(question, answer)                     = asked + opening + answer + closing
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from zopro.engine.models import cannot_load
from zopro.errors import InputError

CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
PROCESSOR_TEMPLATE = "chat_template.json"  # where processors of images kept the template before it was the tokenizer's
QUESTION, ANSWER, NEXT = "Which colour is a ripe plum?", "Plums are mostly purple.", "And a ripe lime?"

# Tried in this order. Rows have no reasoning, so where a template asks for an answer by opening a reasoning tag that
# its answered turns do not have, the answer's own place is the one without reasoning.
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"thinking": False})

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """What a chat template puts around an assistant's answer.

    opening: between the prompt that asks for an answer and the answer. closing: after the answer that ends a
    conversation. following: after an answer that the user's next message follows ("" where the template refuses it).
    parts: whether messages must hold lists of parts instead of text. options: keyword arguments of the template.
    problem: why an answer has no place of its own, or "".
    """

    opening: str = ""
    closing: str = ""
    following: str = ""
    parts: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def load_tokenizer(model: str, trust_remote_code: bool = False, as_published: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the left, with a pad token (EOS if it has none) and a chat template.

    A tokenizer without a template gets ChatML, begun with BOS if there is one that encoding does not add. Unless
    `as_published`, encoding no longer ends a text with EOS, as a prompt would, and no longer begins it with BOS where
    the template writes that and the first word would be encoded otherwise than in the template's own text.

    Raises:
        InputError: there is no such tokenizer, it has no EOS token (a completion could not end), or it cannot be
            kept from adding tokens to the end of a prompt.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, padding_side="left")
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load("tokenizer", model, error) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"model: the tokenizer of {model!r} has no EOS token, which ends a completion. Set one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(model)
    if tokenizer.chat_template is None:
        bos = "{{ bos_token }}" if tokenizer.bos_token_id is not None and not added_start(tokenizer) else ""
        tokenizer.chat_template = bos + CHATML
    if not as_published:
        _encode_as_rendered(tokenizer)
    return tokenizer


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> str:
    """The chat as text that ends where the assistant's turn begins; without what encoding the text adds before it.

    Args:
        messages: passed to the template as they are (role, content, and tool_calls, name, ... where they have those).
        tools: JSON schemas of functions, passed to the template.

    Raises:
        InputError: the template refuses the messages (roles out of order, a system message it does not know) or renders
            no tools.
    """
    text = _render(tokenizer, turn_of(tokenizer), messages, tools, add_generation_prompt=True)
    if tools and text == _render(tokenizer, turn_of(tokenizer), messages, None, add_generation_prompt=True):
        raise InputError("tools: the chat template renders none. Leave the column out or use a template that does.")
    return text.removeprefix(added_start(tokenizer))


def render_answered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: str, tools: Sequence[Any] | None = None
) -> str:
    """The chat with an assistant's answer at its end, as `render_prompt` renders it; raises as it does."""
    answered = [*messages, {"role": "assistant", "content": answer}]
    return _render(tokenizer, turn_of(tokenizer), answered, tools).removeprefix(added_start(tokenizer))


def lost_message(messages: Sequence[Message], text: str) -> str | None:
    """The role of the first message of which a rendered prompt lacks a word, or None.

    Templates drop the reasoning of earlier answers on purpose, and may write a tool's result as JSON.
    """
    for message in messages:
        content = message.get("content")
        lost = False
        if isinstance(content, str) and content.strip() not in text and "</think>" not in content:
            lost = any(word not in text for word in re.findall(r"\w+", content))
        called = [call.get("function", call).get("name", "") for call in message.get("tool_calls") or ()]
        if lost or any(name not in text for name in called):
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
    problem, second, best = "", None, Turn()
    for parts in (False, True):
        shown = False
        for options in OPTIONS:
            question, answer, following = (
                {"role": role, "content": text}
                for role, text in (("user", QUESTION), ("assistant", ANSWER), ("user", NEXT))
            )
            turn = Turn(parts=parts, options=options)
            try:
                asked = _render(tokenizer, turn, [question], add_generation_prompt=True)
                answered = _render(tokenizer, turn, [question, answer])
            except InputError as error:
                problem = problem or str(error).removeprefix("prompt: the chat template ").rstrip(".")
                continue
            if QUESTION in asked and not shown:
                shown, best = True, turn
            if QUESTION not in asked or QUESTION not in answered or ANSWER not in answered:
                problem = problem or "renders the text of a message as nothing"
                continue
            before, _, closing = answered.rpartition(ANSWER)
            if not before.startswith(asked):
                same = next((i for i, (a, b) in enumerate(zip(asked, before, strict=False)) if a != b), len(before))
                problem = f"asks for an answer with {asked[same:]!r}, which a turn that has its answer lacks"
                continue
            try:
                after = _render(tokenizer, turn, [question, answer, following]).rpartition(ANSWER)[2]
            except InputError:
                after = ""
            turn = Turn(before[len(asked) :], closing, after, parts, options)
            ids, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, answered))
            if whole[: len(ids)] == ids and not turn.opening.lstrip().startswith("</"):
                return turn
            second = second or turn  # a token spans the border, or the answer must first close a tag
        if second is not None:
            return second
        if shown:
            break
    return replace(best, problem=f"the chat template {problem}, so that an answer has no place of its own")


def _render(
    tokenizer: PreTrainedTokenizerBase,
    turn: Turn,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
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
    return "".join(tokenizer.convert_ids_to_tokens(_added(tokenizer)[0]))


def check_end(tokenizer: PreTrainedTokenizerBase, argument: str) -> None:
    """Raise InputError for a tokenizer that ends every text with tokens of its own (EOS), prompts too."""
    if end := _added(tokenizer)[1]:
        raise InputError(
            f"{argument}: the tokenizer must not end every prompt with {' '.join(tokenizer.convert_ids_to_tokens(end))}, "
            "after which nothing is asked, as this one does. Set add_eos_token to false in its tokenizer_config.json."
        )


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids that encoding adds before and after every text."""
    plain, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    if not plain:  # a vocabulary without the letter
        return ids, []
    start = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), 0)
    return ids[:start], ids[start + len(plain) :]


def _encode_as_rendered(tokenizer: PreTrainedTokenizerBase) -> None:
    start, end = _added(tokenizer)
    if end and not _add_only(tokenizer, start):
        check_end(tokenizer, "model")
    turn, text = turn_of(tokenizer), added_start(tokenizer)
    if text and not turn.problem:
        asked = _render(tokenizer, turn, [{"role": "user", "content": QUESTION}], add_generation_prompt=True)
        own = tokenizer(asked, add_special_tokens=False)["input_ids"]
        if asked.startswith(text) and tokenizer(asked.removeprefix(text))["input_ids"] != own:
            _add_only(tokenizer, [])


def _add_only(tokenizer: Any, start: list[int]) -> bool:
    """Let encoding add these tokens before a text and none after it; whether that is what it does now."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        tokens = tokenizer.convert_ids_to_tokens(start)
        backend.post_processor = TemplateProcessing(
            single=[*tokens, "$A"], pair=[*tokens, "$A", "$B"], special_tokens=list(zip(tokens, start, strict=True))
        )
    return _added(tokenizer) == (start, [])


def _processor_template(model: str) -> str | None:
    """The chat template of a checkpoint that keeps it beside its image processor."""
    try:
        path = cached_file(model, PROCESSOR_TEMPLATE, _raise_exceptions_for_missing_entries=False)
        template = None if path is None else json.loads(Path(path).read_text("utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return template if isinstance(template, str) else None
