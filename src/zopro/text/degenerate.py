"""Whether an answer is broken: empty, without words, the same words or refusal over and over, what was asked, or in
another language than its reference. A rule, no language model.

    degenerate("I love it. I love it. I love it. I love it.")    # 'repeats "i love it" 4 times in a row'

A policy that is driven too far ends there, and a reward may like it. An answer that the rule passes may still be bad.
"""

from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher
from itertools import groupby
from operator import eq

from zopro.text.language import language

LAST = 400  # words, or characters, that are looked at: loops are at the end of an answer
OFTEN = 3  # times in a row; a single word once more, since people write "very, very, very"
SHARE = 0.5  # of those that the repetition must make up
WINDOW, DISTINCT = 60, 0.2  # at most 12 different words in the last 60 are a loop without a period
LONG = 15.0  # letters a word on average, above which a text has no blanks between its words
SHOWN = 40  # characters of what is repeated
ECHO = 0.8  # twice the words that an answer and a paragraph of the request share in order, over the words of both
COPY = 0.95  # the same without a reference, where a sentence that was to be corrected may share 0.9 with a good answer
FEW = 5  # words of a paragraph: people repeat less than that
REFUSAL = re.compile(
    r"\bi(?:'m| am)(?: so| very| really| truly)? sorry\b|\bi apologi[sz]e\b|\bmy apologies\b"
    r"|\bi (?:can ?not|can't|won't|will not)\b|\bi(?:'m| am) (?:unable|not able)\b"
)
SPARSE = 12  # words for each refusal, of which a text that is more than refusals has more


def degenerate(text: str, request: str = "", reference: str | None = None) -> str | None:
    """Why an answer is broken, in a few words that can follow its name; None where the rule finds nothing.

    request: what it answers; an answer that repeats a paragraph of it, such as the sentence to be translated, is broken,
    unless it is at least as near to the reference.
    reference: a good answer; an answer in another language is broken (`zopro.text.language`).

    >>> degenerate(" "), degenerate("?!?!"), degenerate("It is a very, very, very good day.")
    ('is empty', 'has no words', None)
    """
    if not text.strip():
        return "is empty"
    if not any(letter.isalnum() for letter in text):
        return "has no words"
    units, by_words = _units(text)
    if (found := _repeated(units)) is not None:
        start, period, times = found
        said = (" " if by_words else "").join(units[start : start + period])
        return f'repeats "{said if len(said) <= SHOWN else f"{said[: SHOWN - 1]}…"}" {times} times in a row'
    last = units[-WINDOW:]
    if by_words and len(last) == WINDOW and len(set(last)) <= DISTINCT * WINDOW:
        return f"has {len(set(last))} different words in its last {WINDOW}"
    if refusals := Counter(REFUSAL.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))):
        refusal, times = refusals.most_common(1)[0]
        if times >= OFTEN and len(text.split()) <= SPARSE * times:
            return f'says "{refusal}" {times} times'
    good = _units(reference)[0] if reference and reference.strip() else []
    for paragraph in filter(str.strip, re.split(r"\n\s*\n", request)):
        if _echoes(units, _units(paragraph)[0], good):
            return "repeats what it was asked"
    if reference and (meant := language(reference)) and (spoken := language(text)) and spoken != meant:
        return f"is in the language {spoken}, and not in {meant}"
    return None


def _units(text: str) -> tuple[list[str], bool]:
    """The last words of a text, in lower case and without marks, or its characters where it has no blanks between words;
    and which of the two."""
    words = text.split()
    by_words = len(text) / len(words) <= LONG
    units = [re.sub(r"\W", "", word).lower() or word for word in words] if by_words else [*text.lower()]
    return units[-LAST:], by_words


def _echoes(answer: list[str], asked: list[str], good: list[str]) -> bool:
    least = ECHO if good else COPY
    if len(asked) < FEW or 2 * min(len(answer), len(asked)) <= least * (len(answer) + len(asked)):
        return False
    shared = SequenceMatcher(None, asked, answer, autojunk=False).ratio()
    return shared > least and shared > SequenceMatcher(None, good, answer, autojunk=False).ratio()


def called(text: str, iteration: int | None = None, request: str = "") -> str:
    """What stands over an answer of the final policy to a request: that it is aligned, unless it is broken.

    No reference is known here. Reports and comparisons know the row's, and may find otherwise of the same answer.

    >>> called("Paris.", 2), called("no no no no no no")
    ('aligned (iteration 2)', 'broken')
    """
    name = "broken" if degenerate(text, request) else "aligned"
    return name if iteration is None else f"{name} (iteration {iteration})"


def _repeated(units: list[str]) -> tuple[int, int, int] | None:
    """Where what is repeated first stands, its length, and how often it stands there in a row; the longest stretch."""
    best = 0
    found: tuple[int, int, int] | None = None
    for period in range(1, len(units) // OFTEN + 1):
        least = max((OFTEN + 1 if period == 1 else OFTEN) * period, SHARE * len(units), best + 1)
        same = list(map(eq, units, units[period:]))  # with what stands a period later
        if sum(same) + period < least:
            continue
        start = 0
        for alike, stretch in groupby(same):
            length = sum(1 for _ in stretch)
            covered = length + period
            # 1 + 1 + 1 + 1 is arithmetic
            if alike and covered >= least and any(unit[0].isalpha() for unit in units[start : start + period]):
                best, found, least = covered, (start, period, covered // period), covered + 1
            start += length
    return found
