"""What real chat templates do with tools, calls and turns: shown as TRL shows them, or the row is left out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trl
from trl.data_utils import apply_chat_template

from tiny import tiny_tokenizer
from zopro.errors import InputError
from zopro.tasks import DropRow, Example, Fit
from zopro.text.chat import render_prompt

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOKENIZER = tiny_tokenizer()
TOOLS = [{
    "type": "function",
    "function": {"name": "zlook", "description": "d", "parameters": {"type": "object", "properties": {}}},
}]  # fmt: skip
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "123456789", "type": "function", "function": {"name": "zcall", "arguments": {"x": "zarg"}}}],
}
RESULT = {"role": "tool", "content": "zresult", "tool_call_id": "123456789"}
USER = {"role": "user", "content": "zuser"}
ANSWER = [{"role": "assistant", "content": "yes"}]

# messages, tools, words of them that a template must show
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[Any] | None, list[str]]] = {
    "system": ([{"role": "system", "content": "zsystem"}, USER], None, ["zsystem"]),
    "developer": ([{"role": "developer", "content": "zdeveloper"}, USER], None, ["zdeveloper"]),
    "turns": ([USER, {"role": "assistant", "content": "zsaid"}, {"role": "user", "content": "zagain"}], None, ["zsaid"]),
    "two turns of the user": ([USER, {"role": "user", "content": "zmore"}], None, ["zuser", "zmore"]),
    "tools": ([USER], TOOLS, ["zlook"]),
    "calls": ([USER, CALL, RESULT], TOOLS, ["zlook", "zcall", "zarg", "zresult"]),
    "calls without tools": ([USER, CALL, RESULT], None, ["zcall", "zarg", "zresult"]),
}
KNOWN = ("qwen2_5", "qwen3", "llama3_1", "llama3", "gemma", "gemma3", "phi3", "cohere2", "glm4moe", "gptoss")
AS_THEY_ARE = {("qwen2_5", name) for name in CONVERSATIONS if name != "developer"} | {
    ("llama3_1", name) for name in CONVERSATIONS
}


def fit(template: str, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> tuple[Example, str]:
    TOKENIZER.chat_template = template
    example = Fit(partial(render_prompt, TOKENIZER))(Example(messages, "yes", "no", tools=tools))
    return example, render_prompt(TOKENIZER, example.prompt, example.tools)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", KNOWN)
def test_nothing_vanishes_in_a_real_template(template: str, name: str) -> None:
    messages, tools, words = CONVERSATIONS[name]
    try:
        example, text = fit((TEMPLATES / f"{template}.jinja").read_text(), messages, tools)
    except (DropRow, InputError) as reason:
        assert (template, name) not in AS_THEY_ARE, reason
        return
    assert [word for word in words if word not in text] == []
    if example.prompt == messages:
        expected = apply_chat_template({"prompt": messages, "chosen": ANSWER, "rejected": ANSWER}, TOKENIZER, tools)
        assert text.startswith(expected["prompt"])
    else:
        assert (template, name) not in AS_THEY_ARE and "joined" in example.notes[0]


def test_turns_are_joined_only_where_the_template_wants_alternation() -> None:
    messages, _, _ = CONVERSATIONS["two turns of the user"]
    example, _ = fit((TEMPLATES / "gemma3.jinja").read_text(), messages)
    assert example.prompt == [{"role": "user", "content": "zuser\n\nzmore"}]
    with pytest.raises(InputError, match="System role not supported"):
        fit((TEMPLATES / "gemma.jinja").read_text(), [CONVERSATIONS["system"][0][0], USER])


PLAIN = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("messages", "tools", "part"),
    [
        ([USER], TOOLS, "tools"),
        ([{"role": "system", "content": "Be brief."}, USER], None, "turns of the role system"),
        ([USER, {**CALL, "content": "calling"}, RESULT], None, "calls of tools"),
        ([USER, {"role": "assistant", "content": "c", "function_call": {"name": "f"}}, RESULT], None, "calls of tools"),
        ([{**USER, "tools": TOOLS}], None, "tools"),
    ],
)
def test_what_a_template_leaves_out_is_named(messages: Any, tools: Any, part: str) -> None:
    with pytest.raises(DropRow, match=f"the chat template leaves out {part}"):
        fit(PLAIN, messages, tools)


def test_plain_turns_are_asked_about_once_for_each_order_of_roles() -> None:
    asked = []
    fit = Fit(lambda messages, tools: asked.append(messages) or " ".join(m["content"] for m in messages))
    said = {"role": "assistant", "content": "yes"}
    for messages in ([USER], [USER, said, USER], [USER, said, {"role": "user", "content": "why"}], [said, USER]):
        assert fit(Example(messages, "a", "b")).prompt == messages
    assert len(asked) == 0 + 2 + 1 + 2


def test_keys_that_a_template_does_not_show_are_noted() -> None:
    named = "{% for m in messages %}{{ m['name'] }}: {{ m['content'] }}\n{% endfor %}"
    message = {**USER, "name": "zname", "weight": 1}
    (note,) = fit(named, [message])[0].notes
    assert note == "keys of messages that the chat template does not show: weight"
