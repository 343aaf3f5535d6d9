"""Rows of `task: verifiable`: where prompt, answer and solution are found, and what reaches the reward."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rows import OPTIONS, example, user
from zopro.errors import InputError
from zopro.tasks import DropRow, load
from zopro.tasks.columns import answer_as_given, columns_of, lacking, prompt_as_given
from zopro.tasks.verifiable import LEFT, TAKEN, countdown_prompt

GSM8K = {"question": "Tom has 3 eggs, buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
TOOLS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it raining?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sky", "arguments": {}}}]},
    {"role": "tool", "content": "wet", "name": "sky"},
]


@pytest.mark.parametrize(
    ("row", "prompt", "reference", "chosen"),
    [
        (GSM8K, user(GSM8K["question"]), "7", GSM8K["answer"]),
        ({"prompt": "2 + 2?", "answer": 4}, user("2 + 2?"), "4", "4"),
        ({"prompt": "2 + 2?", "answer": 4.0}, user("2 + 2?"), "4", "4"),
        ({"prompt": "1 / 2?", "answer": 0.5}, user("1 / 2?"), "0.5", "0.5"),
        ({"prompt": "2 + 2?"}, user("2 + 2?"), None, None),
        ({"prompt": TOOLS, "answer": "yes"}, TOOLS, "yes", "yes"),
        ({"problem": "x?", "solution": "so $\\boxed{5}$.", "answer": "5"}, user("x?"), "5", "so $\\boxed{5}$."),
        ({"problem": "x?", "solution": "so $\\boxed{5}$."}, user("x?"), "5", "so $\\boxed{5}$."),
        ({"prompt": "x?", "answer": ["a", "b"]}, user("x?"), "a", "a"),
        ({"prompt": "x?", "answer": "['a', 'b']"}, user("x?"), "a", "a"),
        ({"prompt": "x?", "answer": float("nan"), "ground_truth": [None, "b"]}, user("x?"), "b", None),
        ({"prompt": "x?", "answer": "#### So\n3 + 4\n\n$\\boxed{7}$"}, user("x?"), "7", "#### So\n3 + 4\n\n$\\boxed{7}$"),
        ({"messages": [*user("x?"), {"role": "assistant", "content": "so #### 5"}]}, user("x?"), "5", "so #### 5"),
        ({"prompt": user("x?"), "completion": [{"role": "assistant", "content": "5"}]}, user("x?"), "5", "5"),
        ({"prompt": "x?", "system": "Hm.", "answer": "5"}, [{"role": "system", "content": "Hm."}, *user("x?")], "5", "5"),
        ({"nums": [3, 4], "target": 7}, user(countdown_prompt([3, 4], 7)), None, None),
        ({"nums": "[3, 4]", "target": "7"}, user(countdown_prompt([3, 4], 7)), None, None),
        ({"nums": [3, 4], "target": 7, "prompt": "go", "solution": "3 + 4"}, user("go"), "3 + 4", "3 + 4"),
        ({"nums": None, "target": None, "prompt": "2 + 2?", "answer": "4"}, user("2 + 2?"), "4", "4"),
        ({"nums": [3, 4], "target": "", "prompt": "2 + 2?", "answer": "4"}, user("2 + 2?"), "4", "4"),
    ],
)
def test_formats(row: dict[str, Any], prompt: list[Any], reference: str | None, chosen: str | None) -> None:
    found = example("verifiable", row)
    assert (found.prompt, found.reference, found.chosen, found.rejected) == (prompt, reference, chosen, None)


@pytest.mark.parametrize(("more", "note"), [({}, TAKEN), ({"answer": "7"}, LEFT)])
def test_a_prompt_that_ends_with_the_assistant_s_turn_is_said(more: dict[str, Any], note: str) -> None:
    row = {"prompt": [*user("x?"), {"role": "assistant", "content": "Let me think."}], **more}
    found = example("verifiable", row)
    assert found.prompt == user("x?") and found.notes == (note,)
    talk = {"messages": row["prompt"], **more}
    assert example("verifiable", talk).notes == (), "a whole conversation"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "", "answer": "1"}, "empty prompt"),
        ({"prompt": None, "answer": "1"}, "prompt is null"),
        ({"prompt": "x?", "question": "y?", "answer": "1"}, "prompt and question differ"),
        ({"prompt": "x?", "image": "a.png", "answer": "1"}, "image: a text model cannot see or hear it"),
        ({"nums": [3], "target": None}, "target is null"),
        ({"nums": None, "target": 3}, "nums is null"),
        ({"nums": "", "target": "3"}, "nums is null"),
        ({"nums": float("nan"), "target": 3}, "nums is null"),
    ],
)
def test_rows_that_are_left_out(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DropRow, match=reason):
        example("verifiable", row)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"nums": [3.5], "target": 1}, r"nums: must be a list of whole numbers, got \[3.5\]"),
        ({"nums": "three", "target": 1}, "nums: must be a list of whole numbers, got 'three'"),
        ({"nums": [3], "target": "x"}, "target: must be a number, got 'x'"),
        ({"text": "x"}, "task verifiable expects"),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        example("verifiable", row)


@pytest.mark.parametrize("cell", [["a", "b"], "['a', 'b']"])
def test_all_answers_of_a_list_reach_the_reward_whatever_the_name(cell: Any) -> None:
    for name in ("final_answer", "ground_truth", "completion"):
        row = {"prompt": "x?", name: cell, "answer": None}
        assert columns_of(replace(example("verifiable", row), columns=row))["answer"] == ["a", "b"]
    row = {"prompt": "x?", "ground_truth": [4.0, 5.0]}
    assert columns_of(replace(example("verifiable", row), columns=row))["answer"] == [4.0, 5.0]
    row = {"prompt": "x?", "ground_truth": "a", "solution": ["c", "d"]}
    assert columns_of(replace(example("verifiable", row), columns=row))["answer"] == "a"


@pytest.mark.parametrize("cell", [None, float("nan"), [None], [""], " ", "####", "so \\boxed{ }"])
def test_a_row_without_an_answer_is_left_out_for_rewards_that_need_one(cell: Any) -> None:
    row = {"prompt": "x?", "answer": cell}
    found = replace(example("verifiable", row), columns=row)
    assert lacking(found, ["length:1-2"]) is None
    assert lacking(found, ["length:1-2", "maths"]) == "the reward maths needs answer"


def test_rows_that_a_reward_cannot_read_are_known_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(reward: str, **columns: Any) -> str | None:
        return lacking(replace(example("verifiable", {"prompt": "x?", "answer": "1"}), columns=columns), [reward])

    assert lacks("countdown", nums=[1, 2], target=3) is None
    assert lacks("countdown", nums=float("nan"), target=3) == "the reward countdown needs nums"
    with pytest.raises(InputError, match="nums: must be a list of whole numbers, got '1 2'"):
        lacks("countdown", nums="1 2", target=3)
    monkeypatch.setattr("zopro.rewards.functions.maths._installed", lambda: False)
    assert lacks("maths", answer=["\\frac{1}{2}", "0.5"]) is None and lacks("exact", answer="\\frac{1}{2}") is None
    with pytest.raises(InputError, match=r"the answer 'x . 1' is an expression, for which the package math-verify must"):
        lacks("maths", answer="x + 1")


def test_an_object_is_refused_as_an_answer_unless_the_reward_is_ones_own() -> None:
    row = {"prompt": "x?", "answer": {"value": "Paris"}}
    found = replace(example("verifiable", row), columns=row)
    assert lacking(found, ["python:a:b"]) is None and columns_of(found)["answer"] == {"value": "Paris"}
    with pytest.raises(InputError, match="answer: must be text, a number or a list of them, got dict"):
        lacking(found, ["contains"])


def test_columns_reach_the_reward_only_if_asked_for_and_are_not_called_unread(tmp_path: Any) -> None:
    rows = [GSM8K | {"question": f"{n}?", "level": n} for n in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = SimpleNamespace(
        **vars(OPTIONS), task="verifiable", train_data=str(tmp_path / "train.jsonl"), eval_data="", max_train_rows=0
    )
    kept = load(options, 1, 0, columns=True)
    assert kept.unread == {}
    for found in (*kept.train, *kept.eval):
        assert found.columns == rows[found.row - 1]
    assert not any(found.columns for found in load(options, 1, 0).train)


@pytest.mark.parametrize(
    "prompt",
    [
        user("Hi?"),
        json.dumps(user("Hi?")),
        str(user("Hi?")),
        user("Hi?")[0],
        {"role": ["user"], "content": ["Hi?"]},
        [{"from": "human", "value": "Hi?"}],
        {"from": "human", "value": "Hi?"},
    ],
    ids=str,
)
def test_messages_reach_a_reward_as_messages_in_whatever_form_the_file_has_them(prompt: Any) -> None:
    row = {"prompt": prompt, "answer": "7"}
    made = replace(example("verifiable", row), columns=row)
    assert prompt_as_given(made) == user("Hi?")
    assert answer_as_given(made, "7") == [{"role": "assistant", "content": "7"}]


@pytest.mark.parametrize("other", [{"from": "a page", "to": "b"}, "{'role': 'x'}", '["a", "b"]', "role: user"], ids=str)
def test_other_columns_make_no_messages_of_a_text(other: Any) -> None:
    row = {"prompt": "Hi?", "answer": "7", "other": other}
    assert prompt_as_given(replace(example("verifiable", row), columns=row)) == "Hi?"
