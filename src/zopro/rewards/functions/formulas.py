r"""The formula that a text ends with, in LaTeX or plain: what stands in its last \frac{7}{2} is no number of its own.

formula_at_end(r"so it is $x = \frac{7}{2}$.")      # '\\frac{7}{2}'
"""

from __future__ import annotations

import re
from collections import deque
from unicodedata import normalize

from zopro.rewards.functions.numerals import NUMBER, READ, without_areas

_COMMANDS = "[dtc]?frac|sqrt|pi|times|cdot|div|pm|mp|[dt]?binom|infty|log|ln|exp|sin|cos|tan|emptyset|varnothing"
_MATHS = rf"\\(?:{_COMMANDS})(?![A-Za-z])"
_POWER, _SIGN = r"\^|(?<=[\d)}])\*\*(?=[\d({])", r"[\u03c0\u221a\u221e]|sqrt(?=[(\d])|pi\b"
_INDEX = r"(?<=[A-Za-z])_(?=[\w{])"
_MARK = re.compile(rf"{_MATHS}|{_POWER}|{_SIGN}|{_INDEX}")
"""What makes more than a number of what stands beside it: a command, a power, a root, pi, an index."""
_SAYS = re.compile(rf"{NUMBER.pattern}|\\(?:[dtc]?frac|sqrt|pi|infty|emptyset|varnothing)(?![A-Za-z])|[\u03c0\u221e]")
"""What a text can end with: a number, or what stands for one."""
_PART = re.compile(
    rf"(?:{_MATHS}|\\[,;:! ]|{_POWER}|(?<![A-Za-z])(?:{_SIGN})|{_INDEX}"
    r"|[\d.,+\-\u2212*/=(){}\[\]|!<>\u00d7\u00f7\u00b7 \t]"
    r"|(?<![A-Za-z\\])[A-Za-z](?![A-Za-z]))+"
)
"""A run of mathematics outside of any delimiters: signs, numbers, commands, single letters."""
_LATEX_LINE = re.compile(r"(?<!\\)\$(?=\S)((?:[^$\\]|\\.)+)(?<=\S)\$(?!\d)")  # as Pandoc tells a formula from money
_PLAIN_WORD = re.compile(
    r"(?<![A-Za-z\\{])(?:[A-Za-z]{3,}|an|as|at|be|by|he|if|in|is|it|no|of|on|or|so|to|up|we)(?![A-Za-z(^])"
)
_NAMED = re.compile(r"\\[a-z]+\{[^{}]*\}")  # \text{ or }
_BOLD = re.compile(r"(?<![\w)}*])\*\*(?=\S)([^*\n]+?)\*\*")  # Markdown's, which is no power
_RELATION = re.compile(
    r"(?<![<>!])=|\u2248|\\(?:approx|equiv|simeq|to|rightarrow|[Rr]ightarrow|implies|Longrightarrow|therefore)(?![A-Za-z])"
)
_LAYOUT = re.compile(
    r"\\(?:begin|end|tag|label)\{[^{}]*\}|\\(?:q?quad|checkmark|blacksquare|square|displaystyle|left|right)(?![A-Za-z])"
    r"|\\\\|&|\\boxed\{|\^\s?\{?\s?(?:\\(?:text|mathrm)\{\s?)?(?:st|nd|rd|th)(?![a-z])\s?\}{0,2}"
)
_OPENED = (("\\[", "\\]"), ("\\(", "\\)"))
_RAISED = re.compile("(?<=[\\w)}])[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")  # 2\u00b9\u2070


def formula_at_end(text: str) -> tuple[str, bool] | None:
    r"""What the text says last, where it stands in a formula: of an equation the last side; and whether that formula
    has delimiters. None where the last number stands in plain text.

    >>> formula_at_end(r"so $x = \frac{7}{2}$."), formula_at_end("2^3 = 8"), formula_at_end("It costs $5 or $7.")
    (('\\frac{7}{2}', True), None, None)
    """
    text = _LAYOUT.sub(" ", without_areas(_BOLD.sub(r"\1 ", text[-READ:])).replace("{,}", ","))
    text = _RAISED.sub(lambda digits: f"^{{{normalize('NFKC', digits[0])}}}", text)
    found = deque(_SAYS.finditer(text), maxlen=1)
    if not found:
        return None
    last = found[0]
    inside = _delimited(text, last.start())
    if inside is not None:
        return _last_side(inside), True
    start = text.rfind("\n", 0, last.start()) + 1
    end = text.find("\n", last.end())
    line, place = text[start : None if end < 0 else end], last.start() - start
    run = next((part for part in _PART.finditer(line) if part.start() <= place < part.end()), None)
    said = "" if run is None else _last_piece(_last_side(run[0]))
    return (said, False) if _MARK.search(said) else None


def _delimited(text: str, place: int) -> str | None:
    """What stands between the delimiters of LaTeX around a place; None where there are none."""
    before, after = text[:place], text[place:]
    if before.count("$$") % 2 and "$$" in after:
        return before.rpartition("$$")[2] + after.partition("$$")[0]
    for opening, closing in _OPENED:
        start = before.rfind(opening)
        if start >= 0 and before[start - 1 : start] != "\\" and closing in after and closing not in before[start:]:
            return before[start + len(opening) :] + after.partition(closing)[0]
    start = before.rfind("\n") + 1
    line = text[start:].partition("\n")[0].replace("$$", "  ")
    for formula in _LATEX_LINE.finditer(line):
        if formula.start() < place - start < formula.end():
            return None if _PLAIN_WORD.search(_NAMED.sub("", formula[1])) else formula[1]
    return None


def _last_side(formula: str) -> str:
    """Of an equation what stands behind the last sign of equality."""
    return _RELATION.split(formula)[-1].strip(" \t\n.,;:!") or formula.strip()


def _last_piece(run: str) -> str:
    """Of several, with commas between them, the last one."""
    return re.split(r"[,;.]\s", run)[-1].strip()
