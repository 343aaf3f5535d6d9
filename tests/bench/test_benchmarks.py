"""Scripts that no test runs whole: what they take from the package is there, and some of what they say."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import FOLDER, benchmark

SCRIPTS = sorted([*FOLDER.glob("*.py"), *(FOLDER.parent / "examples").glob("*.py")])


def taken(tree: ast.AST) -> dict[str, Any]:
    """What a script imports from zopro, by the names that it has there."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "zopro":
            home = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(home, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = getattr(home, alias.name)
    return found


def calls(tree: ast.AST, known: dict[str, Any]) -> Iterator[tuple[ast.Call, Any]]:
    """Calls of what is known by its name, whose arguments are all written out."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and callable(known.get(node.func.id))):
            continue
        if all(k.arg for k in node.keywords) and not any(isinstance(one, ast.Starred) for one in node.args):
            yield node, known[node.func.id]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_script_takes_from_the_package_is_there_and_takes_its_arguments(script: Path) -> None:
    tree = ast.parse(script.read_text("utf-8"))
    for call, what in calls(tree, taken(tree)):
        try:
            inspect.signature(what).bind(*call.args, **{keyword.arg or "": keyword for keyword in call.keywords})
        except TypeError as error:
            pytest.fail(f"line {call.lineno}, {ast.unparse(call)}: {error}")


def test_a_table_of_one_iteration_has_no_disparity() -> None:
    script = benchmark("interplay_table")
    metrics: dict[str, Any] = {name: {"product": [0.5]} for name in script.METRICS}
    numbers = {"metrics": {**metrics, "procrustes_disparity": {"product": None}}, "iterations": [0]}
    rows = script.rows(Path("mine"), {**numbers, "off_by_one": {"metrics": metrics}}, "product")
    assert rows[-1] == "| mine | Procrustes disparity |  |"


@pytest.mark.parametrize(
    ("start", "name", "place"), [("sft", "start", "sft"), ("iteration", "iteration 0", "policy/000")]
)
def test_answers_of_what_all_trainings_start_from(tmp_path: Path, start: str, name: str, place: str) -> None:
    for job in ("prepare", "rloo"):
        (tmp_path / "jobs" / job).mkdir(parents=True)
        (tmp_path / "jobs" / job / "job.json").write_text(json.dumps({"job": {"start": start}}))
    for step in ("000004", "000008"):
        (tmp_path / "jobs" / "rloo" / "points" / step).mkdir(parents=True)
    found = benchmark("degenerate_answers").policies(tmp_path)
    assert found == {name: tmp_path / "shared" / place, "rloo": tmp_path / "jobs/rloo/points/000008"}
