"""Fields of option dataclasses with their help texts, and the checks whose errors are one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
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
