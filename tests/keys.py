"""Configuration keys by name, for tests of how their values are read."""

from __future__ import annotations

from typing import Any

from zopro.config.reading import FIELDS
from zopro.config.values import read_as


def read_value(key: str, value: Any) -> Any:
    return read_as(FIELDS[key], value)
