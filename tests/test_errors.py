"""Remedies that name packages: every extra that a message names, and a zopro that is not installed."""

from __future__ import annotations

import importlib.metadata
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from zopro.errors import pip_install

ROOT = Path(__file__).parents[1]
SOURCES = [path.read_text() for path in sorted((ROOT / "src").rglob("*.py"))]
NAMED = {name for source in SOURCES for name in re.findall(r"pip_install\([\"'](\w+)", source)}


@pytest.mark.parametrize("extra", sorted(NAMED))
def test_each_names_the_packages_of_pyproject(extra: str) -> None:
    (declared,) = re.findall(rf"^{extra} = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    named = re.findall("'([^']+)'", pip_install(extra))
    assert [one.lower() for one in named] == [one.lower() for one in re.findall('"([^"]+)"', declared)]


def test_without_an_installation_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert pip_install("maths") == "pip install '.[maths]' in zopro's folder"


def test_no_message_sends_to_an_index_for_zopro() -> None:
    """Where zopro is a checkout, `pip install zopro[...]` finds nothing, or another package of that name."""
    assert not any("install 'zopro[" in source or "nstall zopro[" in source for source in SOURCES)
