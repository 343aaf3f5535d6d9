"""Where a pair's prompt stands: known columns are read, two must agree, other names are named, nothing is made up."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from trl.data_utils import maybe_convert_to_chatml, maybe_extract_prompt

from zopro.choices import TASKS
from zopro.errors import InputError
from zopro.tasks import DropRow, Example, Row, convert, load_rows
from zopro.tasks.beside import unread

OPTIONS = SimpleNamespace(source_language="English", target_language="German")


def example(row: dict[str, Any], task: str = "preference") -> Example:
    return convert(TASKS[task].load()(OPTIONS), Row(row, "f.jsonl", 7))


def turn(role: str, content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


USER, SYSTEM = turn("user", "q"), turn("system", "s")
PAIR = {"chosen": "I say a", "rejected": "I say b"}
GOOD, BAD = turn("assistant", "I say a"), turn("assistant", "I say b")
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}
RESULT = turn("tool", "42", name="f", tool_call_id="1")
SPOKEN = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]
ASKED, CALLED = [SYSTEM, USER], [USER, CALL, RESULT]
PARTS = [{"type": "text", "text": "q"}, {"type": "text", "text": " r"}]
WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}

READ: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "question": ({"question": "q", **PAIR}, [USER]),
    "query": ({"query": "q", **PAIR}, [USER]),
    "instruction": ({"instruction": "q", "input": "", **PAIR}, [USER]),
    "instruction and input": ({"instruction": "do", "input": "q", **PAIR}, [turn("user", "do\n\nq")]),
    "input": ({"system": "s", "input": "q", **PAIR}, [SYSTEM, USER]),
    "messages": ({"messages": [SYSTEM, USER], **PAIR}, [SYSTEM, USER]),
    "messages and the answer": ({"messages": [USER, GOOD], **PAIR}, [USER]),
    "conversations": ({"conversations": SPOKEN, "chosen": {"from": "gpt", "value": "I say a"}, "rejected": BAD}, ASKED),
    "system column": ({"system": "s", "question": "q", **PAIR}, [SYSTEM, USER]),
    "system_prompt": ({"system_prompt": "s", "prompt": "q", **PAIR}, [SYSTEM, USER]),
    "system column beside a conversation": ({"system": "s", **WHOLE}, [SYSTEM, USER]),
    "system column that repeats": ({"system": "s", "prompt": [SYSTEM, USER], **PAIR}, [SYSTEM, USER]),
    "no system": ({"system": None, "prompt": "q", **PAIR}, [USER]),
    "prompt and conversation agree": ({"prompt": "q", **WHOLE}, [USER]),
    "prompt says more than the conversation": ({"prompt": [SYSTEM, USER], **WHOLE}, [SYSTEM, USER]),
    "two names, one prompt": ({"prompt": "About it: q", "question": "q", **PAIR}, [turn("user", "About it: q")]),
    "Python's lists in CSV": ({"prompt": str([SYSTEM, USER]), "chosen": str([GOOD]), "rejected": str([BAD])}, ASKED),
    "JSON in CSV": ({key: json.dumps(value) for key, value in WHOLE.items()}, [USER]),
    "one message": ({"prompt": USER, **PAIR}, [USER]),
    "Arrow's lists": ({"prompt": {"role": ["user"], "content": ["q"], "name": None}, **PAIR}, [USER]),
    "Arrow's nulls": ({"prompt": [turn("user", "q", name=None, tool_calls=None)], **PAIR}, [USER]),
    "text parts": ({"prompt": [turn("user", PARTS)], **PAIR}, [turn("user", "q r")]),
    "turns of one speaker": ({"prompt": [USER, turn("user", "r")], **PAIR}, [USER, turn("user", "r")]),
    "white space": ({"prompt": [turn("user", " q\n")], **PAIR}, [turn("user", " q\n")]),
    "calls and keys": ({"chosen": [USER, CALL, RESULT, GOOD], "rejected": [USER, CALL, RESULT, BAD]}, CALLED),
    "calls as text": ({"prompt": [USER, {**CALL, "tool_calls": json.dumps(CALL["tool_calls"])}, RESULT], **PAIR}, CALLED),
    "developer": ({"prompt": [turn("developer", "s"), USER], **PAIR}, [turn("developer", "s"), USER]),
    "chosen_response": ({"instruction": "q", "chosen_response": "I say a", "rejected_response": "I say b"}, [USER]),
    "accepted": ({"prompt": "q", "accepted": "I say a", "rejected": "I say b"}, [USER]),
    "response_j": ({"question": "q", "response_j": "I say a", "response_k": "I say b", "qid": 3}, [USER]),
    "arena": ({"conversation_a": [USER, BAD], "conversation_b": [USER, GOOD], "winner": "model_b"}, [USER]),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("task", ["preference", "chat"])
def test_the_prompt_is_read_where_it_stands(case: str, task: str) -> None:
    row, prompt = READ[case]
    got = example(row, task)
    assert got.prompt == prompt and (got.chosen, got.rejected) == ("I say a", "I say b")


CONVERSATIONAL: dict[str, dict[str, Any]] = {
    "explicit": {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
    "implicit": {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
    "several turns": {
        "chosen": [USER, BAD, turn("user", "sure?"), GOOD],
        "rejected": [USER, BAD, turn("user", "sure?"), BAD],
    },
    "calls": {"chosen": [USER, CALL, RESULT, GOOD], "rejected": [USER, CALL, RESULT, BAD]},
    "from and value": {
        "chosen": [{"from": "user", "value": "q"}, GOOD],
        "rejected": [{"from": "user", "value": "q"}, BAD],
    },
}


@pytest.mark.parametrize("case", CONVERSATIONAL)
def test_conversations_are_split_as_trl_splits_them(case: str) -> None:
    row = CONVERSATIONAL[case]
    got = example(row)
    expected = maybe_extract_prompt(maybe_convert_to_chatml(copy.deepcopy(row)))
    assert (got.prompt, [got.chosen], [got.rejected]) == (
        expected["prompt"],
        [message["content"] for message in expected["chosen"]],
        [message["content"] for message in expected["rejected"]],
    )


LEFT_OUT = {
    "another name": (
        {"ask": "q", **PAIR},
        r"no prompt: the columns are ask, chosen, rejected; known are prompt, question",
    ),
    "a list under another name": ({"turns": [USER], **PAIR}, "no prompt: the columns are turns"),
    "two prompts": ({"question": "q", "context": "A text.", **PAIR}, "question and context differ"),
    "prompt beside another conversation": ({"prompt": "r", **WHOLE}, "prompt is not what the conversation asks"),
    "system twice": ({"system": "t", "prompt": [SYSTEM, USER], **PAIR}, "two system messages differ"),
    "earlier turns": ({"instruction": "q", "history": [["a", "b"]], **PAIR}, "history: earlier turns"),
    "bare texts": ({"prompt": '["q", "r"]', **PAIR}, "prompt is a list of texts, not of messages"),
    "cut-off prompt": ({"prompt": str([USER])[:-3], **PAIR}, "prompt is messages written as text, cut off"),
    "cut-off answer": (
        {"prompt": "q", **PAIR, "chosen": str([GOOD])[:-8]},
        "chosen is messages written as text, cut off",
    ),
    "image": ({"prompt": "q", **PAIR, "image": {"bytes": b"x"}}, "image: a text model cannot see"),
    "images as text": ({"prompt": "q", **PAIR, "images": "['a.png']"}, "images: a text model cannot see"),
    "videos": ({"prompt": "q", **PAIR, "videos": ["a.mp4"]}, "videos: a text model cannot see"),
    "image part": (
        {"prompt": [turn("user", [{"type": "image"}, {"type": "text", "text": "q"}])], **PAIR},
        "content of type 'image' is not text",
    ),
    "image of a message": ({"prompt": [{**USER, "images": ["a.png"]}], **PAIR}, "images of a message: a text model"),
    "tool_calls column": ({"prompt": "q", **PAIR, "tool_calls": CALL["tool_calls"]}, "tool_calls: calls are read from"),
    "template arguments": ({"prompt": "q", **PAIR, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs: "),
    "answer is a call": ({"prompt": [USER], "chosen": [CALL], "rejected": [BAD]}, "the answer has tool_calls"),
    "answer with thoughts": (
        {"prompt": [USER], "chosen": [{**GOOD, "reasoning_content": "hm"}], "rejected": [BAD]},
        "the answer has reasoning_content",
    ),
    "rendered already": ({"prompt": "<|im_start|>user\nq<|im_end|>\n", **PAIR}, "prompt has a chat template's marks"),
    "no blank lines": (
        {"prompt": "Human: a\nAssistant: b\nHuman: q\nAssistant:", **PAIR},
        "prompt is a conversation without",
    ),
    "one turn and the cue": (
        {"prompt": "Human: q\r\nAssistant:", **PAIR},
        "prompt is a conversation without blank lines",
    ),
    "unknown markup": (
        {"chosen": "### Human: q\n### Assistant: a", "rejected": "### Human: q\n### Assistant: b"},
        "form",
    ),
    "dialogue after a text": (
        {"chosen": "S\n\nHuman: q\n\nAssistant: a", "rejected": "S\n\nHuman: q\n\nAssistant: b"},
        "form",
    ),
    "tie": ({"conversation_a": [USER, BAD], "conversation_b": [USER, GOOD], "winner": "tie"}, "winner names no winner"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_content_that_is_not_used_leaves_the_row_out(case: str) -> None:
    row, reason = LEFT_OUT[case]
    with pytest.raises(DropRow, match=reason):
        example(row)


REFUSED = {
    "NumPy's print": (
        {"chosen": "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]", "rejected": "x"},
        "chosen: looks like a list or an object written as text",
    ),
    "cut off": ({"prompt": "[{'role': 'user', 'content': 'it's'}]", **PAIR}, "prompt: looks like a list"),
    "tools": ({"prompt": "q", **PAIR, "tools": "search"}, "tools: must be a list of JSON schemas"),
    "tool by name": ({"prompt": "q", **PAIR, "tools": ["search"]}, "tools: must be a list of JSON schemas"),
    "unpaired": ({"prompt": "q", "completion": "a", "label": True}, "label (TRL's unpaired preferences, one answer"),
    "a text": ({"text": "q"}, "text (TRL's language modelling; a pair of answers is needed)"),
    "completion": ({"prompt": "q", "completion": "a"}, "(TRL's prompts with one completion"),
    "language modelling": ({"messages": [USER, GOOD]}, "(conversations with one answer"),
    "prompts only": ({"prompt": "q"}, "prompt (TRL's prompts without an answer; a pair of answers is needed); task "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(case: str) -> None:
    row, message = REFUSED[case]
    with pytest.raises(InputError) as error:
        example(row)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2] sums to what?", '{"role": "admin", "content": 1}', "[]", '["a"]', "{'a': 1}"])
def test_texts_that_hold_no_messages_stay_text(text: str) -> None:
    got = example({"prompt": "q", "chosen": text, "rejected": "b"})
    assert got.chosen == text


def test_message_lists_in_columns_of_plain_text_are_refused() -> None:
    row = {"history": str([USER]), "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    with pytest.raises(InputError, match="history: must be text, got messages written as text"):
        example(row, "chat")


def test_an_implicit_prompt_is_noted_and_needs_columns_that_hold_none() -> None:
    texts = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    got = example({**texts, "id": "7", "score_chosen": 0.5})
    assert got.prompt == [turn("user", "The sky is")] and "TRL's implicit prompt" in got.notes[0]
    for name in ("topic", "prompt_text", "Prompt"):
        with pytest.raises(DropRow, match=f"no prompt: the columns are .*{name}; known are prompt"):
            example({**texts, name: "What colour has the sky?"})


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], str([TOOL])])
@pytest.mark.parametrize("task", ["preference", "translation"])
def test_tools_come_along_in_any_spelling(tools: Any, task: str) -> None:
    row = {"prompt": "q", **PAIR} if task == "preference" else {"en": "a", "de": "b", "score": 1}
    assert example({**row, "tools": tools}, task).tools == [TOOL]
    assert example({**row, "tools": None}, task).tools is example({**row, "tools": []}, task).tools is None


def test_a_null_in_parquet_leaves_one_row_out(tmp_path: Path) -> None:
    good = {"chosen": [USER, CALL, RESULT, GOOD], "rejected": [USER, CALL, RESULT, BAD], "tools": [TOOL]}
    null = {"chosen": [{"role": "user", "content": None}, GOOD], "rejected": [USER, BAD], "tools": None}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([good, null]), tmp_path / "x.parquet")
    first, second = load_rows(str(tmp_path / "x.parquet"))
    got = example(first)
    assert (got.prompt, got.tools) == (CALLED, [TOOL])
    with pytest.raises(DropRow, match=r"chosen.content is null"):
        example(second)


def test_a_table_of_two_formats_is_read_row_by_row() -> None:
    arena = {"conversation_a": [USER, GOOD], "conversation_b": [USER, BAD], "winner": "model_a"}
    rows = [{**arena, "prompt": None, "chosen": "", "rejected": None}, {**dict.fromkeys(arena), "prompt": "q", **PAIR}]
    assert [(got.prompt, got.chosen) for got in map(example, rows)] == [([USER], "I say a")] * 2


def test_columns_that_were_not_read_are_known() -> None:
    row = Row({"prompt": "q", **PAIR, "id": 0, "source": "x", "note": " ", "extra": [], "images": []}, "f", 1)
    convert(TASKS["preference"].load()(OPTIONS), row)
    assert unread(row) == ["id", "source"]
    assert example({"prompt": [USER], "chosen": [{**GOOD, "weight": 1}], "rejected": [BAD]}).notes == (
        "keys of the answer's message not read: weight",
    )


def test_a_prompt_beside_a_text_to_summarise_is_not_passed_over() -> None:
    row = {"document": "A text.", "query": "Who?", **PAIR}
    with pytest.raises(DropRow, match="query: rows of this form have their prompt elsewhere"):
        example(row, "summarization")


def test_lists_in_other_tasks_survive_csv() -> None:
    row = {"source": "['A b.', 'C d.']", "target": '["e"]', "rouge_scores": "[0.1, 0.9]"}
    got = example(row, "summarization")
    assert got.prompt[0]["content"].endswith("\n\nA b. C d.") and (got.chosen, got.rejected) == ("e", "A b.")
    with pytest.raises(InputError, match=r"source: looks like .* a list without commas"):
        example({**row, "source": "['A b.'\n 'C d.']"}, "summarization")
    mlqe = {"translation": "{'en': 'a', 'de': 'b'}", "z_mean": "0.5", "source": "news"}
    got = example(mlqe, "translation")
    assert got.prompt[0]["content"].endswith("\n\na") and got.chosen == "b"


def test_summaries_of_conversations_are_read_as_pairs() -> None:
    got = example({"prompt": [SYSTEM, USER], **PAIR}, "summarization")
    assert got.prompt == [SYSTEM, USER] and got.reference == "I say a"
