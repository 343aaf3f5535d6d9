"""What the answer of a row is, and where it stands in a completion."""

from __future__ import annotations

from typing import Any

import pytest

from zopro.errors import InputError
from zopro.rewards.functions import reward_function
from zopro.rewards.functions.answer import has, is_exactly
from zopro.tasks.solutions import answers_of


@pytest.mark.parametrize(
    ("text", "answer", "there"),
    [
        ("The answer is -5", "5", False),
        ("-5 it is", "5", False),
        ("x = \u22125", "5", False),
        ("5 degrees, not -5", "5", True),
        ("pages 3-5", "5", True),
        ("1/2", "2", False),
        ("12/2", "2", False),
        ("on 5/16/2024", "2024", True),
        ("1/2", "1", False),
        ("5 / 6", "5", False),
        ("5 / 6", "6", False),
        ("1 / 2 / 3", "3", True),
        ("It is _Paris_, __of course__.", "Paris", True),
        ("It is __Paris__.", "Paris", True),
        ("new_Paris_hotel", "Paris", False),
        ("def __init__(self)", "init", False),
        ("see list.__init__ there", "init", False),
        ("a __class__.__name__ is", "class", False),
        ("x_1", "1", False),
        ("call _run_", "_run_", True),
        ("1/2 of it", "1/2", True),
        ("either/5", "5", True),
        ("1,005", "5", False),
        ("It's 5,", "5", True),
        ("Paris's", "Paris", True),
        ("Parisian", "Paris", False),
        ("答案是巴黎。", "巴黎", True),
        ("パリです", "パリ", True),
        ("答案是Paris。", "Paris", True),
        ("14年", "14", True),
        ("14年", "4", False),
        ("en e\u0301te\u0301", "été", True),
        ("en été", "e\u0301te\u0301", True),
        ("été", "ete", False),
    ],
)
def test_whole_words_and_numbers(text: str, answer: str, there: bool) -> None:
    assert has(text, answer) is there


def test_an_accent_is_the_same_however_it_is_encoded() -> None:
    assert is_exactly("e\u0301te\u0301", "été") and not is_exactly("ete", "été")


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ('["Paris", "Lutetia"]', ["Paris", "Lutetia"]),
        ("['Paris', 'Lutetia']", ["Paris", "Lutetia"]),
        ("[0, 1]", ["[0, 1]"]),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "Paris"}], ["Paris"]),
        ({"from": "gpt", "value": "Paris"}, ["Paris"]),
        ("[{'role': 'assistant', 'content': 'Paris'}]", ["Paris"]),
        (["#### Sums\n3 + 4\n\nso $\\boxed{7}$", 8], ["7", "8"]),
        (["", None, float("nan"), "Paris"], ["Paris"]),
        *((nothing, []) for nothing in (None, float("nan"), "", [None], [""], [])),
    ],
)
def test_the_answers_of_a_cell(cell: Any, answers: list[str]) -> None:
    assert answers_of(cell) == answers
    for name in ("exact", "chrf"):
        found = reward_function(name)(prompts=["?"], completions=[answers[-1] if answers else "x"], answer=[cell])
        assert found == [1.0 if answers else None] or (name == "chrf" and isinstance(cell, list) and len(cell) == 2)


@pytest.mark.parametrize("name", ["exact", "contains", "maths", "chrf", "rouge"])
def test_a_whole_number_that_a_table_keeps_as_a_float_is_read_as_one(name: str) -> None:
    assert reward_function(name)(prompts=["?"], completions=["4"], answer=[4.0]) == [1.0]


@pytest.mark.parametrize("cell", [{"value": "Paris", "aliases": ["paris"]}, ["Paris", {"value": "x"}], [["Paris"]]])
def test_an_object_is_no_answer(cell: Any) -> None:
    for name in ("contains", "rouge"):
        with pytest.raises(InputError, match=r"^answer: must be text, a number or a list of them, got (dict|list)$"):
            reward_function(name)(prompts=["?"], completions=["Paris"], answer=[cell])
