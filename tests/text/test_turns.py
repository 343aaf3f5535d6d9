"""Prompts as the templates of model families write them are read back as the messages that went in."""

from __future__ import annotations

import pytest

from zopro.text.turns import turns

SAID = [
    ("system", "Be brief.\nAnd kind."),
    ("user", "Is 1 < 2?\n\nSay <b>why</b>."),
    ("assistant", "Yes."),
    ("user", "Ok"),
]


def chatml(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def llama(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


def granite(role: str, text: str) -> str:
    return f"<|start_of_role|>{role}<|end_of_role|>{text}<|end_of_text|>\n"


def harmony(role: str, text: str) -> str:
    return f"<|start|>{role}<|message|>{text}<|end|>"


def phi(role: str, text: str) -> str:
    return f"<|{role}|>\n{text}<|end|>\n"


def zephyr(role: str, text: str) -> str:
    return f"<|{role}|>\n{text}</s>\n"


def gemma(role: str, text: str) -> str:
    return f"<start_of_turn>{'model' if role == 'assistant' else role}\n{text}<end_of_turn>\n"


ASK = {
    chatml: "<|im_start|>assistant\n",
    llama: "<|start_header_id|>assistant<|end_header_id|>\n\n",
    granite: "<|start_of_role|>assistant<|end_of_role|>",
    harmony: "<|start|>assistant",
    phi: "<|assistant|>\n",
    zephyr: "<|assistant|>\n",
    gemma: "<start_of_turn>model\n",
}


@pytest.mark.parametrize("family", ASK, ids=lambda one: one.__name__)
@pytest.mark.parametrize("thinking", ["", "<think>\n\n</think>\n\n"])
def test_a_family(family, thinking: str) -> None:
    said = [(role, text) for role, text in SAID if family is not gemma or role != "system"]
    text = "<bos>" * (family is gemma) + "".join(family(*one) for one in said) + ASK[family] + thinking
    expected = [("model" if family is gemma and role == "assistant" else role, text) for role, text in said]
    assert turns(text) == expected


@pytest.mark.parametrize("text", ["POST: <title> a [b] </s> c\nTL;DR:", "", "user Hi assistant", "<script>x</script>"])
def test_a_text_without_marks_stays_as_it_is(text: str) -> None:
    assert turns(text) == [("prompt", text)]


def test_the_demo_s_template() -> None:
    assert turns("<bos><customer>Could I have three towels?<assistant>") == [("customer", "Could I have three towels?")]


def test_the_demo_s_template_with_a_mark_of_another_in_what_is_asked() -> None:
    assert turns("<customer>What is <|user|>?<assistant>") == [("customer", "What is <|user|>?")]
    assert turns("<|user|>\n<assistant><|assistant|>") == [("user", "<assistant>")]


TAGS = "Write XML: <user>Bob</user> and <tool>x</tool>. How do I close <assistant> tags?"
OTHERS = f"{TAGS} What is <start_of_turn>user\n, or [INST], or <|user|>?"


@pytest.mark.parametrize("family", ASK, ids=lambda one: one.__name__)
def test_marks_of_other_families_are_spelled_in_what_is_said(family) -> None:
    said = TAGS if family in (phi, zephyr, gemma) else OTHERS
    role = "model" if family is gemma else "assistant"
    text = family("user", said) + family("assistant", "<system>Ok</system>") + family("user", "Go on.") + ASK[family]
    assert turns(text) == [("user", said), (role, "<system>Ok</system>"), ("user", "Go on.")]


@pytest.mark.parametrize(
    "text", ["Fix this HTML: <system>a</system>", TAGS, "<user>Bob</user> fix it", "Close <assistant>"], ids=str
)
def test_tags_of_a_text_without_a_template_are_no_turns(text: str) -> None:
    assert turns(text) == [("prompt", text)]
