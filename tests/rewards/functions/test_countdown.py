"""`countdown` against Python's own arithmetic, and what it must not take for an equation."""

from __future__ import annotations

import itertools

import pytest

from zopro.rewards.functions.countdown import score


def test_every_equation_of_three_numbers_is_computed_as_python_does() -> None:
    nums = (7, 3, 8)
    for a, b, c in itertools.permutations(nums):
        for p, q in itertools.product("+-*/", repeat=2):
            for text in (f"{a} {p} {b} {q} {c}", f"({a}{p}{b}){q}{c}", f"{a}{p}({b}{q}{c})"):
                try:
                    value = eval(text)
                except ZeroDivisionError:
                    continue
                for target in (24, 31, value):
                    expected = 1.0 if abs(value - target) < 1e-9 else 0.1
                    if float(target).is_integer():
                        assert score(text, nums, int(target)) == expected, text


@pytest.mark.parametrize(
    "text",
    [
        "<answer>(3 + 4) * 5</answer>",
        "<answer> (3 + 4) * 5 = 35 </answer> or 3 + 4 + 5",
        "35 = (3 + 4) * 5",
        "First 3 + 4 = 7.\nSo the equation is [3 + 4] \u00d7 5 = 35.",
        "\\boxed{(3 + 4) \\times 5}",
        "5*(4+3)",
        "Answer: (3 + 4) * 5 = 35, which uses 3, 4 and 5 once.",
        "\\[ (3 + 4) \\times 5 = 35 \\]",
        "\\( (3 + 4) \\times 5 = 35 \\)",
        "\\[(3+4)\\cdot5\\]",
        "[(3 + 4) * 5 = 35]",
        "((3 + 4) * 5 = 35)",
        "(which is (3+4)*5)",
        "1. (3 + 4) * 5 = 35",
        "2) [(3 + 4) * 5 = 35]",
        "- (3 + 4) * 5 = 35",
        "Answer - (3 + 4) * 5 = 35",
        "(3 + 4) x 5 = 35",
        "(3 + 4) * 5 = 35 on a 3 x 3 board",
    ],
)
def test_where_the_equation_is_found(text: str) -> None:
    assert score(text, [3, 4, 5], 35) == 1


@pytest.mark.parametrize(
    "text",
    [
        "35",
        "(3 + 4) * 5 * 1",
        "(3 + 4) * 4",
        "3 ** 4 - 46 + 5",
        "7 * 5",
        "34 + 5 - 4",
        "__import__('os').getpid()",
        "3 4 5",
        "((3 + 4) * 5",
        "(3 + 4) * 5)",
        "3. (3 + 4 + 5",
        "",
    ],
)
def test_what_does_not_use_the_numbers_once_gets_nothing(text: str) -> None:
    assert score(text, [3, 4, 5], 35) == 0


def test_the_numbers_alone_get_a_tenth_and_a_division_is_exact() -> None:
    assert score("3 + 4 + 5", [3, 4, 5], 35) == 0.1
    assert score("1 / 3 * 3", [1, 3, 3], 1) == 1
    assert score("3 / (4 - 4)", [3, 4, 4], 1) == 0
    assert score("7", [7], 7) == 1
    assert score("- 3 + 38 = 35", [3, 38], 35) == 1
    assert score("-(3 + 4) * 5 = 35", [3, 4, 5], 35) == 0.1 == score("3 x 4 x 5 = 35", [3, 4, 5], 35)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3 + 4 * 8 = 35", 1.0),
        ("35 = 3 + 4 * 8", 1.0),
        ("3 + 4 * 8 = 3 + 32 = 35", 1.0),
        ("3 + 4 * 8 = 36", 0.1),
        ("<answer>3 + 4*8 = 99</answer>", 0.1),
        ("3+4+8=3*4*8=3*4+8=4*8-3=3+4*8", 0.1),
        ("35 = 3 + 4 + 8", 0.1),
    ],
)
def test_an_equation_that_does_not_hold_is_not_right(text: str, right: float) -> None:
    """Else a chain of guesses would be as good as an answer."""
    assert score(text, [3, 4, 8], 35) == right


@pytest.mark.parametrize("text", ["\\frac{12}{4} = 3", "$\\frac{12}{4}$", "\\boxed{\\dfrac{12}{4} = 3}"])
def test_fractions_in_latex_are_divisions(text: str) -> None:
    assert score(text, [12, 4], 3) == 1
    assert score("\\frac{3 + 4}{\\frac{1}{5}} = 35", [3, 4, 1, 5], 35) == 1


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<answer>3 + 4</answer> no <ANSWER>(3 + 4) * 5</Answer>", 1.0),
        ("so <answer> the <answer>(3 + 4) * 5</answer>", 1.0),
        ("<answer>(3 + 4) * 5</answer> and <answer>3 + 4 + 5", 1.0),
        ("</answer>(3 + 4) * 5", 1.0),
        ("(3 + 4) * 5 <answer></answer>", 0.0),
    ],
)
def test_the_last_answer_that_is_closed_counts(text: str, right: float) -> None:
    assert score(text, [3, 4, 5], 35) == right


def test_tags_without_end_are_each_read_once() -> None:
    """A policy may repeat one; the square of 200 000 is a quarter of an hour."""
    assert score("<answer>" * 200_000 + "(3 + 4) * 5</answer>", [3, 4, 5], 35) == 1
    assert score("<answer>" * 200_000, [3, 4, 5], 35) == 0
