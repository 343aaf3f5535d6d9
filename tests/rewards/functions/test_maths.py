r"""`maths`: which number a completion ends with, and when two are equal."""

from __future__ import annotations

import logging

import pytest

from zopro.errors import InputError
from zopro.rewards.functions import maths, reward_function


def right(text: str, answer: object) -> float | None:
    return reward_function("maths")(prompts=["?"], completions=[text], answer=[answer])[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 is 7.", "7"),
        ("It costs $1,200.50.", "1200.5"),
        ("10-3=7", 7),
        ("minus four, -4", "-4"),
        ("3/4 of it", "0.75"),
        ("12.0", "12"),
        ("2 or 3? \\boxed{3}. Not 2.", "3"),
        ("\\boxed{2} no, \\boxed{10,000}", "10000"),
        ("\\boxed{42\\text{ cm}}", "42"),
        ("\\boxed{\\text{42 cm}}", "42"),
        ("\\boxed{\\textbf{42}}", "\\text{42}"),
        ("\\boxed{1{,}000}", "1000"),
        ("It is $1{,}000$.", "1,000"),
        ("first 3\n#### 7\n", "7"),
        ("1, 2", "2"),
        ("1.5e3", "1500"),
        ("7", "we add 3 and 4: #### 7"),
        ("7", "\\boxed{7}"),
        ("#### Step 1: add\n3 + 4 = 7\n\nThe answer is 7.", "7"),
        ("#### 1. Add\n3 + 4 = 7\n", "7"),
        ("#### Final answer\n7", "7"),
        ("#### Answer: 7", "7"),
        ("#### 3 + 4 = 7", "7"),
        ("#### **7**", "7"),
        ("#### 18 dollars", "18"),
        ("#### **18** eggs a day", "18"),
        ("#### A total of 18", "18"),
        ("#### 18 dollars\n\nChecked: 9 * 2.", "18"),
        ("\\boxed{18 dollars}", "18"),
        ("8", [7, "eight", "8"]),
    ],
)
def test_equal(text: str, answer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maths, "_installed", lambda: False)
    assert right(text, answer) == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *(
            ("7 or 8", "7"),
            ("5-3", "-3"),
            ("none", "0"),
            ("\\boxed{8} 7", "7"),
            ("0.333", "1/3"),
            ("2/0", "2"),
            ("71", "7"),
        ),
        *(
            ("#### 18 of 20", "18"),
            ("#### 18 of 20", "20"),
            ("#### 18x", "18"),
            ("#### 2 million", "2"),
            *(("#### 3*4", "34"), ("#### 2**3", "23"), ("#### x 18", "18")),
        ),
        *(("#### x + 1", "1"), ("#### x >= 7", "7"), ("#### minus 7", "7"), ("#### 1. Add\nIt is 7", "1"), ("####", "0")),
        *(("\\boxed{1\\text{ or }2}", "12"), ("\\boxed{\\text{1 or 2}}", "2")),
        *(("\\boxed{(1, 2)}", "2"), ("\\boxed{2 pi}", "2"), ("#### \\frac{1}{2}", "2"), ("#### So\n\\frac{1}{2}", "2")),
        ("9", [7, "eight"]),
    ],
)
def test_different(text: str, answer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maths, "_installed", lambda: False)
    assert right(text, answer) == 0


def test_without_math_verify_expressions_are_refused_or_counted_as_wrong_and_both_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(maths, "_installed", lambda: False)
    maths._say_that_it_is_missing.cache_clear()
    with pytest.raises(
        InputError,
        match=r"^reward: maths compares numbers, and the answer 'x \+ 1' is .*pip install 'math-verify",
    ):
        right("x + 1", "x + 1")
    with pytest.raises(InputError, match="is an expression"):
        right("8", ["seven", "eight"])
    with caplog.at_level(logging.WARNING):
        assert right("\\boxed{\\frac{1}{2}}", "0.5") == 0 == right("\\boxed{\\frac{1}{2}}", "0.5")
    assert len(caplog.records) == 1 and "pip install 'math-verify" in caplog.text


def test_with_math_verify_expressions_are_compared() -> None:
    pytest.importorskip("math_verify")
    assert right("so \\boxed{\\frac{1}{2}}", "0.5") == 1
    assert right("\\boxed{1 + x}", "x+1") == 1 == right("it is $\\sqrt{8}$", "2\\sqrt{2}")
    assert right("It is 1/2", "\\frac{1}{2}") == 1 and right("It is 1/3", "\\frac{1}{2}") == 0
    assert right("\\boxed{x + 2}", "x+1") == 0
