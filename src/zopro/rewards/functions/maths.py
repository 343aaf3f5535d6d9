r"""`maths`: the number or expression that the completion ends with equals the row's answer.

What counts is the last \boxed{...}, else what follows the last "####", else the last number or, where that stands in a
formula (\frac{7}{2}, 2^{10}), the formula; of words there ("18 eggs") the only number among them, and after a heading
("#### Step 1") what the text below it ends with. Numbers are compared here, exactly; expressions (LaTeX, fractions of
symbols, sets) by the package math-verify (the extra `maths`).
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from typing import Any

from zopro.errors import InputError, pip_install
from zopro.rewards.functions.base import Reward, for_all_answers
from zopro.rewards.functions.formulas import formula_at_end
from zopro.rewards.functions.numerals import NUMBER, last_number, number, undressed, value_of, without_areas
from zopro.tasks.solutions import BOX, MARK, answers_of, boxed

logger = logging.getLogger(__name__)

SECONDS = 5
"""For one comparison of expressions, after which they count as different."""

_EMPHASIS = re.compile(r"(?<![\w)*])\*+|(?<!\*)\*+(?![\w(*])")
_ANY, _WORD = r"[^\W\d_]+", r"[^\W\d_]{2,}"  # one letter beside a number may be a variable
_AMONG_WORDS = re.compile(
    rf"(?:(?:{_ANY}[\s:,]+)*{_WORD}[\s:,]+)?({NUMBER.pattern})(?:[.,]|\s+{_WORD}[.,]?(?:\s+{_ANY}[.,]?)*)?"
)
_BRACKETS = re.compile(r"^[({\[](?=[^,(){}\[\]]*[)}\]]$)|(?<=[^,(){}\[\]])[)}\]]$")  # around a single thing
_SIDE = re.compile(r"[^=<>!\\]*=([^=]*)")  # of an equation without LaTeX
_ITEM, _BEGINS = re.compile(r"\d{1,3}[.)]\s"), re.compile(r"[-+\u2212]?\.?\d")
_CHANGES = re.compile(
    r"\b(?:minus|plus|times|over|or|not|pi|squared?|cubed?|root|hal(?:f|ves)|thirds?|quarters?|dozens?|hundreds?|"
    r"thousands?|[mbtr]+illions?)\b",
    re.IGNORECASE,
)


def equals(text: str, answer: str) -> bool:
    """Whether the completion ends with the answer. Raises `InputError`: the answer is an expression, and the package
    that compares those is not installed."""
    expected = number(answer)
    said = boxed(text)
    marked = said is None and MARK in text
    if marked:
        said = text.rpartition(MARK)[2]
    if said is None:
        given, formula = _number_at_end(text)
    else:
        given, formula = _marked_number(said) if marked else _number_among_words(said), said
    if expected is not None and given is not None:
        return given == expected
    if expected is not None and formula is None:
        return False  # no number at all
    if not _installed():
        if expected is None:
            _refuse([answer])
        _say_that_it_is_missing()
        return False
    if _same_expression((text if expected is None else formula or text) if said is None else said, answer):
        return True
    # Of a text without LaTeX the package reads nothing but what is a number or an expression as a whole.
    plain = said is None and given is not None and "\\" not in text and "$" not in text
    return plain and _same_expression(str(given), answer)


def _number_among_words(said: str) -> Fraction | None:
    """The number that what was said is, or that it says what equals, words beside it that do not change it aside.

    >>> _number_among_words("**18** eggs a day"), _number_among_words("18 of 20"), _number_among_words("2 pi")
    (Fraction(18, 1), None, None)
    """
    said = _EMPHASIS.sub("", said)
    whole = number(said)
    if whole is not None:
        return whole
    bare = undressed(said)
    equation = _SIDE.fullmatch(bare)
    found = _AMONG_WORDS.fullmatch(equation[1].strip() if equation else bare)
    return value_of(found[1]) if found and not _CHANGES.search(bare) else None


def _number_at_end(text: str) -> tuple[Fraction | None, str | None]:
    r"""The last number of a text, and the formula that it stands in; None for a number that is only a part of that.

    >>> _number_at_end("It is 7."), _number_at_end(r"It is $\frac{7}{2}$."), _number_at_end("It is $(7)$")
    ((Fraction(7, 1), None), (None, '\\frac{7}{2}'), (Fraction(7, 1), '(7)'))
    """
    found = formula_at_end(text)
    if found is None:
        return last_number(without_areas(text)), None
    formula, delimited = found
    ways = (formula, _BRACKETS.sub("", formula)) if delimited else ()
    return next((value for way in ways if (value := _number_among_words(way)) is not None), None), formula


def _marked_number(said: str) -> Fraction | None:
    """The number of what follows a mark: its first line or, where that is a heading, the last number below it."""
    first, *below = said.strip().splitlines() or [""]
    found = _number_among_words(first)
    bare = _EMPHASIS.sub("", undressed(first)).strip()
    if not below or (_BEGINS.match(bare) and not _ITEM.match(bare)):
        return found
    last = below[-1]
    return None if "\\" in undressed(last) else _number_at_end(said)[0]


@cache
def _installed() -> bool:
    return find_spec("math_verify") is not None


@cache
def _say_that_it_is_missing() -> None:
    logger.warning(
        "reward maths: a completion ends with an expression, which counts as wrong without the package math-verify. "
        "Install it: %s",
        pip_install("maths"),
    )


def _same_expression(said: str, answer: str) -> bool:
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    # Its time limit is a signal, which only the main thread can have; elsewhere the caller's own limit must do.
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    read: Callable[[str], Any] = lambda text: parse(_in_dollars(text), parsing_timeout=seconds)  # noqa: E731
    try:
        return bool(verify(read(answer), read(said), timeout_seconds=seconds))
    except TimeoutException:
        return False


def _in_dollars(text: str) -> str:
    """LaTeX as the package looks for it."""
    return text if "$" in text or BOX in text else f"${text}$"


def refuse(columns: Mapping[str, Any]) -> None:
    """Raise `InputError`: a row's answers are expressions, and the package that compares those is not installed."""
    _refuse(answers_of(columns["answer"]))


def _refuse(answers: Sequence[str]) -> None:
    if not _installed() and all(number(answer) is None for answer in answers):
        raise InputError(
            f"reward: maths compares numbers, and the answer {answers[0]!r:.60} is an expression, for which the package "
            f"math-verify must be installed. Install it: {pip_install('maths')}"
        )


def maths(parameter: str = "") -> Reward:
    """1 for a completion whose last boxed expression or number equals the row's answer, else 0; None without one."""

    def right(text: str, answers: Sequence[str]) -> bool:
        # Without the package the numbers among several answers can still be compared.
        numbers = answers if _installed() else [answer for answer in answers if number(answer) is not None]
        return any(equals(text, answer) for answer in numbers or answers)

    return for_all_answers(right)
