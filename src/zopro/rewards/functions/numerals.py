r"""Numbers as people and models write them, exactly: 1,234.50, -3/4, 3 1/2, $12, 42\text{ cm}^2.

number("1,200.50") == number("1200.5")
"""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_WHOLE = r"\d{1,3} (?=\d{1,3}/\d{1,3}(?!\d|[.,]\d|/))"  # of a mixed number: 3 1/2
# A minus after a digit, a letter or a bracket subtracts. Exponents are short: 1e999999999 would fill the memory.
NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}])[-+\u2212])?(?:(?<![\w.,/]){_WHOLE})?(?:{_DIGITS})(?:[eE][-+]?\d{{1,3}}(?!\d))?"
    r"(?:\s?/\s?\d+(?!\.?\d))?"
)
_NAMED = r"\\(?:text(?:bf|it|rm|normal)?|math(?:bf|rm|it|sf)|mbox|underline)"
_TEXT = re.compile(rf"{_NAMED}\{{([^{{}}]*)\}}")
_DEGREES = re.compile(r"\^\s?(?:\\circ|\{\s?\\circ\s?\})(?![A-Za-z])|\\degree(?![A-Za-z])")
_DRESS = re.compile(rf"\\[$%!,;: ]|[$%°€£]|\\\(|\\\)|\{{,\}}|{_DEGREES.pattern}")
_LONG_UNITS = (
    "mm|cm|dm|km|in|inch|inches|ft|feet|foot|yd|yards?|mi|miles?|(?:centi|milli|kilo)?met(?:er|re)s?|units?|sec|seconds?"
)
_UNIT = rf"(?:[a-z]{{1,2}}/)?(?:{_LONG_UNITS}|[ms])"
_UNIT_BESIDE = rf"(?:{_LONG_UNITS}|[a-z]{{1,2}}/[ms])"  # right behind a digit a lone letter is a variable: 6s^2
_POWER = r"\$?\s?\^\s?(?:\{\s?-?[1-4]\s?\}|-?[1-4])\$?|[²³]"
_AREA = re.compile(
    rf"{_NAMED}\{{\s*{_UNIT}(?:\s*\}}(?:{_POWER})|(?:{_POWER})\s*\}})"
    rf"|(?<=\d){_UNIT_BESIDE}(?:{_POWER}|[23]\b)"
    rf"|(?:(?<=\d[ ~])|(?<=\d\$)|(?<=\d\\[,;: ])|(?<=\$[ ])){_UNIT}(?:{_POWER}|[23]\b)"
    rf"|(?<![A-Za-z\\])(?:{_LONG_UNITS})(?:{_POWER})"
)
"""A unit to a power, in text or in LaTeX."""
READ = 10_000
"""Characters at the end of a text that are looked at."""
_LONGEST = 300  # characters of a number; Python refuses to read integers of thousands of digits


def number(text: str) -> Fraction | None:
    """The number that `text` is, units of money and text aside, or None.

    >>> number("1,234.50"), number("-3/4"), number("3 1/2"), number("$12"), number("x + 1")
    (Fraction(2469, 2), Fraction(-3, 4), Fraction(7, 2), Fraction(12, 1), None)
    """
    bare = undressed(text).rstrip(".").strip()
    return value_of(bare) if NUMBER.fullmatch(bare) else None


def undressed(text: str) -> str:
    r"""Without marks of money and of LaTeX, areas and volumes, and without its \text{...} where no number stands in it.

    >>> undressed(r"25\text{ cm}^2"), undressed("90^\\circ"), undressed("7 km^2")
    ('25', '90', '7')
    """
    text = _TEXT.sub(lambda found: f" {found[1]} " if re.search(r"\d", found[1]) else " ", without_areas(text))
    return _DRESS.sub("", text).strip()


def without_areas(text: str) -> str:
    """`text` without units to a power, whose exponents are no numbers: cm^2, m², ft2; nor is the ring of degrees one.

    >>> without_areas("It is 25 cm^2, or 25 m2, not x^2.")
    'It is 25  , or 25  , not x^2.'
    """
    return _AREA.sub(" ", _DEGREES.sub("", text))


def last_number(text: str) -> Fraction | None:
    """The last number in a text.

    >>> last_number("3 + 4 is 7, so it is 7."), last_number("10-3"), last_number("none")
    (Fraction(7, 1), Fraction(3, 1), None)
    """
    found = NUMBER.findall(text[-READ:].replace("{,}", ","))
    return value_of(found[-1]) if found else None


def value_of(digits: str) -> Fraction | None:
    """The value of what `NUMBER` matches; None of one that is too long, has no value, or is no proper mixed number."""
    if len(digits) > _LONGEST:
        return None
    above, _, below = digits.replace(",", "").replace("\u2212", "-").partition("/")
    whole, _, above = above.strip().rpartition(" ")
    try:
        part = Fraction(above) / Fraction(below.strip() or 1)
        if not whole:
            return part
        return (-1 if whole[0] == "-" else 1) * (abs(Fraction(whole)) + part) if part < 1 else None
    except (ValueError, ZeroDivisionError):
        return None
