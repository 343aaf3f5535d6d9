"""Fields of option dataclasses with their help texts, and the checks whose errors are one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any

from zopro.errors import InputError


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text})


def check(ok: bool, name: str, rule: str, value: Any, remedy: str = "") -> None:
    if not ok:
        raise InputError(f"{name}: {rule}, got {value!r}.{' ' + remedy if remedy else ''}")


def one_of(config: Any, name: str, choices: Sequence[Any], remedy: str = "") -> None:
    value = getattr(config, name)
    check(value in choices, name, f"must be one of {', '.join(map(str, choices))}", value, remedy)


def positive(config: Any, *names: str) -> None:
    for name in names:
        check(getattr(config, name) > 0, name, "must be greater than 0", getattr(config, name))


def not_negative(config: Any, *names: str) -> None:
    for name in names:
        check(getattr(config, name) >= 0, name, "must not be negative", getattr(config, name))


LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 3.4e38  # beyond which torch and the libraries fail in their own words


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
