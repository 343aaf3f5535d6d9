"""Lists and objects that went through a table as text: CSV holds a list of messages as JSON or as Python prints it."""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
import tokenize
import warnings
from collections.abc import Mapping
from typing import Any

from zopro.errors import InputError

# No two of these take white space side by side: that would be tried in every way to share it.
_BRACKETS = re.compile(r"""\s*(?:array\s*\(\s*)?(?:\[\s*(?:array\s*\(\s*)?\{|\{\s*["']).*[\]})]\s*""", re.DOTALL)
_CUT = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:.*[^\]})\s]\s*""", re.DOTALL)
_TEXTS = re.compile(r"""\s*\[\s*["'].*["']\s*\]\s*""", re.DOTALL)
_LITERAL = re.compile(r"""\s*(?:\[\s*["'\d.{-].*\]|\{\s*["'].*\})\s*""", re.DOTALL)
_SPEAKER = re.compile(
    r"""["'](?:role|from)["']\s*:\s*(?:\[\s*)?["'](?:system|developer|user|assistant|tool|function|human|gpt)["']"""
)
_SAID = re.compile(r"""["'](?:content|value|tool_calls)["']\s*:""")
_BETWEEN = {tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT}


def spells_messages(text: str) -> bool:
    """Whether `text` looks like messages written out, be it well formed or not."""
    return all((_BRACKETS.fullmatch(text), _SPEAKER.search(text), _SAID.search(text)))


def spells_cut_messages(text: str) -> bool:
    """Whether `text` looks like messages written out whose end is missing, as spreadsheets cut long cells."""
    return _CUT.fullmatch(text) is not None


def spells_texts(text: str) -> bool:
    """Whether `text` is a list of texts written out."""
    try:
        return bool(_TEXTS.fullmatch(text)) and all(isinstance(entry, str) for entry in spelled(text))
    except ValueError:
        return False


def spelled(text: str) -> Any:
    """The list or object that `text` spells, in JSON or as Python prints it. Raises `ValueError` if it spells none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _python(text)
    if not isinstance(value, list | Mapping):
        raise ValueError("neither a list nor an object")
    return value


def parsed(value: Any, column: str) -> Any:
    """`value` or, if it is text that looks like a list or an object, what it spells. Raises `InputError` if nothing."""
    if not isinstance(value, str) or not _LITERAL.fullmatch(value):
        return value
    try:
        return spelled(value)
    except ValueError as error:
        raise InputError(
            f"{column}: looks like a list or an object written as text, but is {error}. Write JSON"
        ) from None


def _python(text: str) -> Any:
    try:
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown escapes in the text
            value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError("neither JSON nor a Python literal") from error
    kinds = [kind for kind in kinds if kind not in _BETWEEN]
    if any(a == b == tokenize.STRING for a, b in itertools.pairwise(kinds)):
        raise ValueError("a list without commas, as NumPy prints it")  # Python would join its texts into one
    return value


def without_nulls(value: Any) -> Any:
    """`value` without keys that hold null, at any depth."""
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return value


def blank(value: Any) -> bool:
    """Whether a cell says nothing: null, white space, or an empty list or object, also as text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}")
    return value is None or (isinstance(value, list | Mapping) and not value)
