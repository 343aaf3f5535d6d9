"""Values of configuration keys, from YAML, the command line or Python, as the type of their field.

So `2e-4` (a string to YAML 1.1), `"false"` and `--report_to wandb,tensorboard` mean what they say.
"""

from __future__ import annotations

import math
import os
import unicodedata
from dataclasses import Field
from datetime import date
from typing import Any

from zopro.choices import Registry
from zopro.errors import InputError


def read_as(field: Field[Any], value: Any) -> Any:
    """Return `value` as the type of `field`. Raises `InputError` for what cannot be read so."""
    kind = str(field.type)
    if kind == "list[str]" and field.metadata.get("choices"):
        kind = "list of names"
    rule, read = _READERS[kind]
    try:
        found = read(value)
    except (TypeError, ValueError, OverflowError):
        remedy = " Put it in quotes." if read is _str and isinstance(value, bool) else ""  # YAML's no, off, yes
        raise InputError(f"{field.name}: must be {rule}, got {value!r}.{remedy}") from None
    return [_at_home(field, name) for name in found] if isinstance(found, list) else _at_home(field, found)


def _at_home(field: Field[Any], value: Any) -> Any:
    """The value with the folder that ~ or ~user stands for, where it is a path or, as in `model:PATH`, ends in one."""
    choices = field.metadata.get("choices", ())
    choices = choices.values() if isinstance(choices, Registry) else ()
    prefixes = [f"{choice.prefix}:" for choice in choices if choice.name.endswith((":PATH", ":FILE"))]
    prefixes += [""] * field.metadata.get("path", False)
    for prefix in prefixes:
        if isinstance(value, str) and value.startswith(f"{prefix}~"):
            return prefix + os.path.expanduser(value.removeprefix(prefix))
    return value


TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in TRUTH:
        return TRUTH[value.lower()]
    raise ValueError


def _bool_or_int(value: Any) -> bool | int:
    try:
        return _int(value)
    except ValueError:
        return boolean(value)


def _int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _float(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _str(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(text(item) for item in value)
    return text(value)


def text(value: Any) -> str:
    """One value as text: paths, numbers and dates too. Control characters and half characters are no text."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, bool) or not isinstance(value, (str, int, float, date)):
        raise ValueError
    found = str(value)
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in found):
        raise ValueError
    return found


def _words(value: Any) -> list[str]:
    words = [word for word in map(str.strip, _str(value).split(",")) if word]
    return [] if words == ["none"] else words


def _names(value: Any) -> list[str]:
    """Words, each of which may hold commas where it stands in a list, in YAML or in brackets on the command line."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        import yaml  # which `zopro --help` need not wait for

        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError from error
    return [text(name) for name in value] if isinstance(value, list | tuple) else _words(value)


def _floats(value: Any) -> list[float]:
    if isinstance(value, str):
        inner = value.strip("[] ")
        value = inner.split(",") if inner else []
    return [_float(number) for number in (value if isinstance(value, list | tuple) else [value])]


_READERS: dict[str, tuple[str, Any]] = {
    "bool": ("true or false", boolean),
    "bool | int": ("true, false or a whole number", _bool_or_int),
    "int": ("a whole number", _int),
    "float": ("a finite number", _float),
    "str": ("a text", _str),
    "float | str": ("a number or a word", _str),
    "list[str]": ("a list of words, comma separated", _words),
    "list of names": ("a list of names, comma separated", _names),
    "list[float]": ("a list of finite numbers, comma separated", _floats),
}
