"""ARCHITECTURE.md names every folder of the package, and nothing that does not exist; nor do CONTRIBUTING.md and docs."""

from __future__ import annotations

import dataclasses
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "zopro"
PAGES = [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
QUOTED = {page.name: sorted(set(re.findall(r"`([^`\n]+)`", page.read_text("utf-8")))) for page in PAGES}
ALL = sorted({text for quoted in QUOTED.values() for text in quoted})
SITE = {name for page in (ROOT / "docs").rglob("*.md") for name in re.findall(r"`(zopro(?:\.\w+)+)`", page.read_text())}
CODE = sorted(SITE | {text for text in ALL if re.fullmatch(r"zopro(\.\w+)+", text)})
PATHS = [text for text in ALL if re.fullmatch(r"[\w.-]+(/[\w.-]*)+|\w+\.py", text)]


def found(name: str) -> bool:
    """Whether a dotted name is a module, or can be reached as attributes or dataclass fields of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            thing = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            fields = {f.name for f in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
            if not hasattr(thing, attribute) and attribute not in fields:
                return False
            thing = getattr(thing, attribute, None)
        return True
    return False


@pytest.mark.parametrize("name", CODE)
def test_names_exist(name: str) -> None:
    assert found(name)


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path: str) -> None:
    assert (ROOT / path).exists() or (PACKAGE / path).exists()


def test_every_folder_is_in_the_tree() -> None:
    folders = {f"{path.parent.relative_to(PACKAGE).as_posix()}/" for path in PACKAGE.rglob("*.py")} - {"./"}
    assert len(folders) > 15 and not folders - set(QUOTED["ARCHITECTURE.md"])


def test_what_does_not_exist_is_not_found() -> None:
    assert found("zopro.zo.Targeted.tensor") and found("zopro.zo.StepRecord.seed")
    assert not found("zopro.zo.Aimed") and not found("zopro.nowhere.Targeted")
