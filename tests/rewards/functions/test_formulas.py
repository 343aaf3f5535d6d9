r"""`maths` without a box: a number inside of a formula is no answer, and the formula that a text ends with is one."""

from __future__ import annotations

import logging
import time

import pytest

from zopro.rewards.functions import maths, reward_function
from zopro.rewards.functions.numerals import number


def right(text: str, answer: object) -> float | None:
    return reward_function("maths")(prompts=["?"], completions=[text], answer=[answer])[0]


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package that compares expressions."""
    monkeypatch.setattr(maths, "_installed", lambda: False)


PARTS = [
    *(
        ("The answer is $\\frac{7}{2}$.", "2"),
        ("The answer is $\\sqrt{2}$", "2"),
        ("so $2^{10}$.", "10"),
        ("so 2^10", "10"),
    ),
    *(
        ("-\\frac12", "12"),
        ("x = \\frac{7}{2}", "2"),
        ("\\[\n\\frac{7}{2}\n\\]", "2"),
        ("$$2^{10}$$", "10"),
        ("2**10", "10"),
    ),
    *(("It's 10^{-3}", "-3"), ("$2\\pi$", "2"), ("2\\pi", "2"), ("2\u03c0", "2"), ("\u221a2", "2"), ("sqrt(2)", "2")),
    *(
        ("5 \u00d7 10^3", "3"),
        ("5\u00b2", "5"),
        ("x_1", "1"),
        ("$x_1$", "1"),
        ("$x > 5$", "5"),
        ("$5x$", "5"),
        ("2 pi", "2"),
    ),
    *(("$(1, 2)$", "2"), ("$\\{1,2\\}$", "2"), ("$7 \\text{ or } 8$", "8"), ("2 roots, so $\\pi$", "2")),
    *(("#### Answer\n$2^{10}$", "10"), ("2 \\frac{1}{2}", "1/2"), ("The area is 25 cm^2.", "2"), ("25 m2", "2")),
    *(("It is 3 1/2.", "1/2"), ("10 3/2", "13/2")),
]
WHOLE = [
    *(
        ("$7$.", "7"),
        ("so $x = 7$", "7"),
        ("$3 \\times 4 = 12$", "12"),
        ("$\\frac{14}{2} = 7$", "7"),
        ("\\(x = 7\\)", "7"),
    ),
    *(("\\[\n3+4 = 7 \\tag{1}\n\\]", "7"), ("$$x &= 3+4 \\\\ &= 7$$", "7"), ("\\begin{align} x &= 7 \\end{align}", "7")),
    *(
        ("$1\\,000$", "1000"),
        ("$7\\%$", "7"),
        ("$\\$7$", "7"),
        ("$7^{\\circ}$", "7"),
        ("$7\\text{ cm}$", "7"),
        ("$(7)$", "7"),
    ),
    *(("25 cm^2", "25"), ("$25$ cm$^2$", "25"), ("$25\\text{ cm}^2$", "25"), ("25 m\u00b2", "25"), ("25 m2", "25")),
    *(
        ("\\boxed{25\\text{ m}^2}", "25"),
        ("#### 25 ft^2", "25"),
        ("$25\\,\\mathrm{m/s^2}$", "25"),
        ("It is 3 1/2.", "3.5"),
    ),
    *(("\\boxed{-3 1/2}", "-3.5"), ("$5 and $7", "7"), ("5 + $3 = $8", "8"), ("$5-$7", "7"), ("5$, 6$", "6")),
    *(("$5 apples cost 10$", "10"), ("2^10 = 1024", "1024"), ("x^2 = 16, x = 4", "4"), ("**7**", "7"), ("_7_", "7")),
    *(("7, where $x$ is the number", "7"), ("$5^{th}$", "5"), ("\\item 7", "7"), ("\\boxed{7", "7"), ("5!", "5")),
    *(
        ("$7 \\quad \\blacksquare$", "7"),
        ("Since $x=3$, it is 7.", "7"),
        ("$\\approx 7$", "7"),
        ("f(2) = 2^2+3 \u2192 7", "7"),
    ),
]


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(("text", "part"), PARTS)
def test_a_part_of_a_formula_is_not_the_answer(text: str, part: str) -> None:
    assert right(text, part) == 0


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(("text", "answer"), WHOLE)
def test_a_number_is_one_in_any_dress(text: str, answer: str) -> None:
    assert right(text, answer) == 1


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    ("text", "answer", "wanted"),
    [
        ("\\boxed{6}", "6s^2", 0),
        ("The area is 4s^2.", "4", 0),
        ("It is 25 m^2.", "25", 1),
        ("It falls at 9.8m/s^2.", "9.8", 1),
        ("It turned 90^\\circ.", "90", 1),
        ("The angle is 30^{\\circ}", "30", 1),
        ("The answer is **8**(eight)", "8", 1),
        ("It is 2**10", "10", 0),
        ("She spends $4, so 6$ is left", "6", 1),
    ],
)
@pytest.mark.usefixtures("_alone")
def test_what_is_a_unit_a_power_or_money_and_what_is_not(text: str, answer: str, wanted: int) -> None:
    if "s^2" in answer:
        assert number(answer) is None
    else:
        assert right(text, answer) == wanted


def test_a_formula_without_the_package_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    maths._say_that_it_is_missing.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert right("It is $\\frac{1}{2}$.", "1/2") == 0
    assert "ends with an expression" in caplog.text


def test_with_the_package_the_formula_is_compared() -> None:
    pytest.importorskip("math_verify")
    for text, answer in (
        *(("The answer is $\\frac{1}{2}$.", "1/2"), ("It is $x = \\frac{7}{2}$", "3.5"), ("so $2^{10}$.", "1024")),
        *(
            ("so 2^10", "1024"),
            ("-\\frac12", "-0.5"),
            ("$x = \\sqrt{49}$.", "7"),
            ("5 \\times 10^3", "5000"),
            ("$2 + 3$", "5"),
        ),
    ):
        assert right(text, answer) == 1, text
    assert [right(text, part) for text, part in PARTS if part != "1/2"] == [0] * sum(part != "1/2" for _, part in PARTS)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    "piece", ["$", "$a ", "\\[", "\\(", "$$", "2^", "5 m", "\\text{cm", "cm^", "1 1/", "\\text{ ", "a_"]
)
def test_what_a_model_repeats_without_end_is_read_once(piece: str) -> None:
    before = time.process_time()
    right(piece * 20_000 + "5", "7")
    assert time.process_time() - before < 5
