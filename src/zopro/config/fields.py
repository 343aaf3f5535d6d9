"""Fields of option dataclasses with their help texts, and the checks whose errors are one line."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import field, fields
from types import MappingProxyType
from typing import Any, TypeVar

from zopro.choices import Registry
from zopro.errors import InputError, nearest


def option(default: Any, text: str, choices: Registry[Any] | Sequence[Any] = (), *, path: bool = False) -> Any:
    """A dataclass field with its help text, and what its value must be among. path: its value may be one."""
    return field(default=default, metadata={"help": text, "choices": choices, "path": path})


Config = TypeVar("Config")


def for_parsers(config: type[Config]) -> type[Config]:
    """A dataclass that transformers' and TRL's parsers of command lines take, as they do TRL's own.

    They give all metadata to argparse, write types into fields, which classes share with the one they derive from, and
    read `float | str` as float alone. So the class has fields of its own, with help texts only, and such a type is a str.
    """
    own = {name: copy.copy(found) for name, found in config.__dataclass_fields__.items()}  # type: ignore[attr-defined]
    for name, found in own.items():
        found.metadata = MappingProxyType({key: text for key, text in found.metadata.items() if key == "help"})
        if found.type == "float | str":
            config.__annotations__[name] = "str"
    config.__dataclass_fields__ = own  # type: ignore[attr-defined]
    return config


def check_choices(config: Any, group: type) -> None:
    """Hold every field of `group` that has choices against them. Raises `InputError`."""
    for key in fields(group):
        choices, value = key.metadata.get("choices", ()), getattr(config, key.name)
        if isinstance(choices, Registry):
            for name in value if isinstance(value, list) else [value]:
                if name or key.default != "":  # else empty means: what something else says
                    choices.check(name)
        elif choices:
            known = [choice for choice in choices if choice != ""]
            rule = f"must be one of {', '.join(map(str, known))}"
            check(value in choices, key.name, rule, value, nearest(str(value), map(str, known)).strip())


def number_or(config: Any, name: str, *words: str) -> float | str:
    """The value of a field as a number above 0, or as one of `words`: however it was written, so that a run's
    configuration is found to be the same. Raises `InputError` for what is neither."""
    value = getattr(config, name)
    if value in words:
        return str(value)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    check(0 < number < math.inf, name, "must be a number greater than 0, or auto", value)
    check(number <= LARGEST_SCALE, name, f"must be at most {LARGEST_SCALE:g}", value)
    return number


def check(ok: bool, name: str, rule: str, value: Any, remedy: str = "") -> None:
    if not ok:
        raise InputError(f"{name}: {rule}, got {value!r}.{' ' + remedy if remedy else ''}")


def one_of(config: Any, name: str, choices: Sequence[Any]) -> None:
    value = getattr(config, name)
    check(value in choices, name, f"must be one of {', '.join(map(str, choices))}", value)


def positive(config: Any, *names: str) -> None:
    for name in names:
        check(getattr(config, name) > 0, name, "must be greater than 0", getattr(config, name))


def not_negative(config: Any, *names: str) -> None:
    for name in names:
        check(getattr(config, name) >= 0, name, "must not be negative", getattr(config, name))


LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 3.4e38  # beyond which torch and the libraries fail in their own words
LARGEST_SCALE = 1e6  # of displacements and decay: what is more breaks any model, and the learning rate is blamed
LONGEST = 1e9  # seconds: threads and sockets cannot wait for ten times as long


def at_most(config: Any, limit: float, *names: str) -> None:
    for name in names:
        check(getattr(config, name) <= limit, name, f"must be at most {limit:g}", getattr(config, name))


def representable(config: Any, *but: str) -> None:
    """Refuse numbers that no int32 and no float32 can hold."""
    for name in (key.name for key in fields(config)):
        value = getattr(config, name)
        if name not in but and isinstance(value, (int, float)):
            limit = LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT
            check(abs(value) <= limit, name, f"must be at most {limit:g}", value)
