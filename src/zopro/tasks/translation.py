"""Machine translation with direct assessment: wmt20_mlqe (Fomicheva et al. 2020).

A row is a source sentence, one machine translation and its score by people (`z_mean`, standardised per annotator), so
the reward model is a regression. MLQE has **no human reference**. For chrF the translation itself stands in, and only
where people rated it clearly above average: z_mean >= REFERENCE_Z, the better half of English-German (mean raw score
92 of 100, lowest 78). Other rows have no reference, and rows with the raw `score` alone have none either, unless a
column `reference` holds one: a metric skips them and a metric judge gives no verdict.
So chrF measures likeness to good machine translations, not to human ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from zopro.errors import InputError
from zopro.tasks.base import Example, Format, Task, as_number, as_text, ask, columns, first, make_example
from zopro.tasks.literals import blank, parsed
from zopro.tasks.rows import Row

REFERENCE_Z = 0.2
"""Least z_mean (standard deviations above an annotator's mean) of a translation that serves as a reference."""

LANGUAGE_CODES = {
    "arabic": "ar",
    "chinese": "zh",
    "czech": "cs",
    "english": "en",
    "estonian": "et",
    "french": "fr",
    "german": "de",
    "italian": "it",
    "japanese": "ja",
    "nepali": "ne",
    "romanian": "ro",
    "russian": "ru",
    "sinhala": "si",
    "spanish": "es",
}
"""ISO 639-1 codes of MLQE's languages and a few more; any other language is looked up under the name given."""


def _code(language: str) -> str:
    return LANGUAGE_CODES.get(language.lower(), language)


def _example(row: Row, source: str, translation: str, languages: tuple[str, str]) -> Example:
    request = f"Translate this sentence from {languages[0]} to {languages[1]}.\n\n{source}"
    column = first(row, "z_mean", "score")
    score, own = as_number(row[column], column), row.get("reference")
    reference = translation if column == "z_mean" and score >= REFERENCE_Z else None
    reference = reference if blank(own) else as_text(own, "reference")
    return make_example(ask(request) if source else [], translation, score=score, reference=reference)


def from_mlqe(row: Row, languages: tuple[str, str]) -> Example:
    """translation.{source code, target code} or two plain columns original|source and translation; z_mean or score."""
    pair = parsed(row["translation"], "translation")
    if isinstance(pair, Mapping):
        texts = [as_text(_side(pair, option, name), name) for option, name in zip(_OPTIONS, languages, strict=True)]
    else:
        source = next((name for name in ("original", "source") if name in row), None)
        if source is None:
            raise InputError("translation: must hold both languages, or stand beside original or source")
        texts = [as_text(row[source], source), as_text(pair, "translation")]
    return _example(row, texts[0], texts[1], languages)


_OPTIONS = ("source_language", "target_language")


def _side(pair: Mapping[str, Any], option: str, language: str) -> Any:
    code = _code(language)
    if code not in pair:
        raise InputError(f"{option}: {language!r} ({code}) is not in translation, which has {', '.join(pair)}")
    return pair[code]


def from_columns(row: Row, languages: tuple[str, str], names: tuple[str, str]) -> Example:
    """One column per language, named by its code."""
    source, translation = (as_text(row[name], name) for name in names)
    return _example(row, source, translation, languages)


def task(options: Any) -> Task:
    """The translation task from options.source_language to options.target_language: chrF measures and judges."""
    languages = (options.source_language, options.target_language)
    codes = (_code(languages[0]), _code(languages[1]))
    dotted = (f"translation.{codes[0]}", f"translation.{codes[1]}")
    formats = (
        Format(columns("translation", "z_mean|score"), partial(from_mlqe, languages=languages)),
        *(
            Format(columns(*names, "z_mean|score"), partial(from_columns, languages=languages, names=names))
            for names in (codes, dotted)
        ),
    )
    return Task("translation", formats, default_judge="chrf", metric="chrf", reward="regression")
