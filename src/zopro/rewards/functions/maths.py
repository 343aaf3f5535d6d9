r"""`maths`: the number or expression that the completion ends with equals the row's answer.

What counts is the last \boxed{...}, else what follows the last "####", else the last number; of words there ("18 eggs")
the only number among them, and after a heading ("#### Step 1") the last number. Numbers are compared here, exactly;
expressions (LaTeX, fractions of symbols, sets) by the package math-verify (the extra `maths`).
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from typing import Any

from zopro.errors import InputError, pip_install
from zopro.rewards.functions.base import Reward, for_all_answers
from zopro.tasks.solutions import BOX, MARK, boxed

logger = logging.getLogger(__name__)

SECONDS = 5
"""For one comparison of expressions, after which they count as different."""

_DIGITS = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
# A minus after a digit, a letter or a bracket subtracts. Exponents are short: 1e999999999 would fill the memory.
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])[-+\u2212])?(?:{_DIGITS})(?:[eE][-+]?\d{{1,3}}(?!\d))?(?:\s?/\s?\d+(?!\.?\d))?")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:bf|rm)|mbox)\{([^{}]*)\}")
_DRESS = re.compile(r"\\[$%!,;: ]|[$%°€£]|\\\(|\\\)|\{,\}")
_EMPHASIS = re.compile(r"(?<![\w)*])\*+|(?<!\*)\*+(?![\w(*])")
_ANY, _WORD = r"[^\W\d_]+", r"[^\W\d_]{2,}"  # one letter beside a number may be a variable
_AMONG_WORDS = re.compile(
    rf"(?:(?:{_ANY}[\s:,]+)*{_WORD}[\s:,]+)?({_NUMBER.pattern})(?:[.,]|\s+{_WORD}[.,]?(?:\s+{_ANY}[.,]?)*)?"
)
_SIDE = re.compile(r"[^=<>!\\]*=([^=]*)")  # of an equation without LaTeX
_ITEM, _BEGINS = re.compile(r"\d{1,3}[.)]\s"), re.compile(r"[-+\u2212]?\.?\d")
_CHANGES = re.compile(
    r"\b(?:minus|plus|times|over|or|not|pi|squared?|cubed?|root|hal(?:f|ves)|thirds?|quarters?|dozens?|hundreds?|"
    r"thousands?|[mbtr]+illions?)\b",
    re.IGNORECASE,
)
_LONGEST = 300  # characters of a number; Python refuses to read integers of thousands of digits


def number(text: str) -> Fraction | None:
    """The number that `text` is, units of money and text aside, or None.

    >>> number("1,234.50"), number("-3/4"), number("$12"), number("x + 1")
    (Fraction(2469, 2), Fraction(-3, 4), Fraction(12, 1), None)
    """
    bare = _undressed(text).rstrip(".").strip()
    return _value(bare) if _NUMBER.fullmatch(bare) else None


def _undressed(text: str) -> str:
    r"""Without marks of money and of LaTeX, and without its \text{...} where no number stands in it."""
    text = _TEXT.sub(lambda found: f" {found[1]} " if re.search(r"\d", found[1]) else " ", text)
    return _DRESS.sub("", text).strip()


def last_number(text: str) -> Fraction | None:
    """The last number in a text.

    >>> last_number("3 + 4 is 7, so it is 7."), last_number("10-3"), last_number("none")
    (Fraction(7, 1), Fraction(3, 1), None)
    """
    found = _NUMBER.findall(text[-10_000:].replace("{,}", ","))
    return _value(found[-1]) if found else None


def _value(digits: str) -> Fraction | None:
    if len(digits) > _LONGEST:
        return None
    above, _, below = digits.replace(",", "").replace("\u2212", "-").partition("/")
    try:
        return Fraction(above.strip()) / Fraction(below.strip() or 1)
    except (ValueError, ZeroDivisionError):
        return None


def equals(text: str, answer: str) -> bool:
    """Whether the completion ends with the answer. Raises `InputError`: the answer is an expression, and the package
    that compares those is not installed."""
    expected = number(answer)
    said = boxed(text)
    marked = said is None and MARK in text
    if marked:
        said = text.rpartition(MARK)[2]
    given = last_number(text) if said is None else _marked_number(said) if marked else _number_among_words(said)
    if expected is not None and given is not None:
        return given == expected
    if expected is not None and said is None:
        return False  # no number at all
    if not _installed():
        if expected is None:
            raise InputError(
                f"reward: maths compares numbers, and the answer {answer!r:.60} is an expression, for which the package "
                f"math-verify must be installed. Install it: {pip_install('maths')}"
            )
        _say_that_it_is_missing()
        return False
    if _same_expression(text if said is None else said, answer):
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
    bare = _undressed(said)
    equation = _SIDE.fullmatch(bare)
    found = _AMONG_WORDS.fullmatch(equation[1].strip() if equation else bare)
    return _value(found[1]) if found and not _CHANGES.search(bare) else None


def _marked_number(said: str) -> Fraction | None:
    """The number of what follows a mark: its first line or, where that is a heading, the last number below it."""
    first, *below = said.strip().splitlines() or [""]
    found = _number_among_words(first)
    bare = _EMPHASIS.sub("", _undressed(first)).strip()
    if not below or (_BEGINS.match(bare) and not _ITEM.match(bare)):
        return found
    last = below[-1]
    return None if "\\" in _undressed(last) else last_number(said)


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


def maths(parameter: str = "") -> Reward:
    """1 for a completion whose last boxed expression or number equals the row's answer, else 0; None without one."""

    def right(text: str, answers: Sequence[str]) -> bool:
        # Without the package the numbers among several answers can still be compared.
        numbers = answers if _installed() else [answer for answer in answers if number(answer) is not None]
        return any(equals(text, answer) for answer in numbers or answers)

    return for_all_answers(right)
