"""What is handed out: the wheel has all of the package and nothing else, the sdist all it is built and tested from."""

from __future__ import annotations

import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "docs", "examples", "benchmarks")
FILES = {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "constraints.txt", "mkdocs.yml"}


def on_disk(folder: Path) -> set[str]:
    """Files below a folder, without what Python and macOS leave there."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {path.relative_to(ROOT).as_posix() for path in files if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    (built,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("sdist")), versions=["standard"])
    with tarfile.open(built) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return zipfile.ZipFile(built)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_sdist_has_whole_folders(folder: str, sdist: set[str]) -> None:
    expected = on_disk(ROOT / folder)
    assert expected and not expected - sdist


def test_the_sdist_has_what_it_is_built_and_tested_with(sdist: set[str]) -> None:
    assert not {*FILES, "pyproject.toml", ".ci/run"} - sdist
    assert {name.partition("/")[0] for name in sdist if "/" in name} == {*FOLDERS, ".ci"}


def test_the_wheel_has_all_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    package = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    assert package == {name.removeprefix("src/") for name in on_disk(ROOT / "src")}
    assert {"zopro/py.typed", "zopro/tasks/shipped/chat.jsonl", "zopro/analysis/page/report.html.j2"} < package


def test_the_wheel_says_who_where_and_for_which_pythons(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    about = message_from_bytes(wheel.read(name))
    assert about["Author"] and about.get_all("Project-URL") and about["License-Expression"] == "Apache-2.0"
    oldest = about["Requires-Python"].removeprefix(">=")
    pythons = {value.rpartition(" ")[2] for value in about.get_all("Classifier") or [] if ":: 3." in value}
    assert oldest in pythons and min(pythons, key=lambda version: int(version.partition(".")[2])) == oldest


def test_the_version_stands_where_a_release_needs_it(wheel: zipfile.ZipFile) -> None:
    version = Path(str(wheel.filename)).name.split("-")[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## {version} - " in (ROOT / "CHANGELOG.md").read_text("utf-8")
