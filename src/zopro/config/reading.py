"""From a YAML file and `--key value` words to a checked `RunConfig`; nothing is loaded or written here.

Values are read as the type of their field, so that `2e-4` (a string to YAML 1.1) and `--report_to wandb,tensorboard`
mean what they say. Words from the command line win over the file.
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from zopro.config import RunConfig
from zopro.errors import InputError, nearest

FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read the YAML file at `path`, let `overrides` win, and check the result.

    Raises `InputError` for a missing file, YAML that does not parse, an unknown key and a value of the wrong type.
    """
    return config_from({**_read_yaml(Path(path)), **(overrides or {})})


def config_from(values: Mapping[str, Any]) -> RunConfig:
    """The configuration with these keys, each read as the type of its field; None means the default.

    Raises `InputError` for an unknown key and a value of the wrong type.
    """
    for key in values:
        if key not in FIELDS:
            raise InputError(f"{key}: no such configuration key.{nearest(str(key), FIELDS)}")
    # An empty value (`eval_data:`) means: the default.
    return RunConfig(**{key: read_value(key, value) for key, value in values.items() if value is not None})


def read_value(key: str, value: Any) -> Any:
    """Return `value`, from YAML or the command line, as the type of configuration key `key`."""
    kind = str(FIELDS[key].type)
    if kind == "list[str]" and FIELDS[key].metadata.get("choices"):
        kind = "list of names"
    rule, read = _READERS[kind]
    try:
        return read(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{key}: must be {rule}, got {value!r}.") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"CONFIG: must be a readable YAML file, got '{path}' ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise InputError(f"CONFIG: must be a YAML file in UTF-8, got '{path}'.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise InputError(f"CONFIG: must be valid YAML, got '{path}'{where}: {problem}.") from None
    except (ValueError, OverflowError, RecursionError) as error:  # a date that is none, brackets without end
        raise InputError(f"CONFIG: must be valid YAML, got '{path}': {type(error).__name__} ({error}).") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"CONFIG: must hold 'key: value' lines, got a {type(values).__name__} in '{path}'.")
    return values


def _bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError


def _bool_or_int(value: Any) -> bool | int:
    try:
        return _bool(value)
    except ValueError:
        return _int(value)


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
    if isinstance(value, list):
        return ",".join(_scalar(item) for item in value)
    return _scalar(value)


def _scalar(value: Any) -> str:
    """One value as text: of YAML's types, dates and numbers say what was typed. Control characters are no text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float, date)):
        raise ValueError
    text = str(value)
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise ValueError
    return text


def _words(value: Any) -> list[str]:
    words = [word for word in map(str.strip, _str(value).split(",")) if word]
    return [] if words == ["none"] else words


def _names(value: Any) -> list[str]:
    """Words, each of which may hold commas where it stands in a list, in YAML or in brackets on the command line."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError from error
    return [_scalar(name) for name in value] if isinstance(value, list) else _words(value)


def _floats(value: Any) -> list[float]:
    values = value.strip("[] ").split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [_float(number) for number in values if number != ""]


_READERS: dict[str, tuple[str, Any]] = {
    "bool": ("true or false", _bool),
    "bool | int": ("true, false or a whole number", _bool_or_int),
    "int": ("a whole number", _int),
    "float": ("a finite number", _float),
    "str": ("a text", _str),
    "float | str": ("a number or a word", _str),
    "list[str]": ("a list of words, comma separated", _words),
    "list of names": ("a list of names, comma separated", _names),
    "list[float]": ("a list of finite numbers, comma separated", _floats),
}
