"""Names inside a run directory are spelled in one module; here every literal of the source is searched for them."""

from __future__ import annotations

import ast
import doctest
from collections.abc import Iterator
from pathlib import Path

import pytest

from zopro.store import layout
from zopro.store.layout import Layout, numbered

ROOT = Path(__file__).parents[2]
RUN = Layout("RUN")
FILES = {
    path.name
    for path in (
        *(RUN.config(), RUN.environment(), RUN.metrics(), RUN.usage(), RUN.summary(), RUN.analysis(), RUN.report()),
        *(RUN.lock(), RUN.owner(), RUN.journal(0), RUN.samples(0), RUN.preferences(0), RUN.verdicts("pairs", 0)),
    )
}
FOLDERS = {
    path.parts[1]
    for path in (
        *(RUN.sft(), RUN.initial(), RUN.policies(), RUN.rewards(), RUN.iterations(), RUN.evaluations()),
        *(RUN.snapshots("policy", 0), RUN.trainers(), RUN.figures(), RUN.demo()),
    )
}
OTHERS = {  # file -> names that it may spell, and why
    "src/zopro/compare/jobs.py": {"trainer"},  # of a job, whose folder is no run
    "benchmarks/crash_matrix.py": {"config.yaml"},  # the one it gives to the command
    "benchmarks/same_bits.py": {"iterations", "evaluations", "policy", "metrics.jsonl"}  # of two source trees: either may
    | {"journal.jsonl", "samples.jsonl", "preferences.jsonl"},  # have a layout of its own
}
MAKE_PATHS = tuple(f".{name}" for name in ("glob", "rglob", "joinpath", "with_name", "Path", "path.join"))


def words(node: ast.AST) -> Iterator[str]:
    """The literals in an expression, those inside f-strings too."""
    yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def code_words(tree: ast.Module) -> Iterator[str]:
    """The literals of a module but its docstrings, and other strings that stand alone."""
    prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    yield from (word for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in prose for word in words(n))


def spelled(source: str) -> set[str]:
    """Names of a run directory in `source`: files in every literal that may be a path, folders where a path is made of
    them, and "000" for the digits of an iteration."""
    tree = ast.parse(source)
    found = {name for word in code_words(tree) if " " not in word and (name := word.split("/")[-1]) in FILES}
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [node.right]
        elif isinstance(node, ast.Call) and f".{ast.unparse(node.func)}".endswith(MAKE_PATHS):
            parts = node.args
        elif isinstance(node, ast.FormattedValue) and node.format_spec is not None:
            found |= {"000" for word in words(node.format_spec) if word == layout.DIGITS}
        found |= {name for part in parts for word in words(part) for name in word.split("/") if name in FOLDERS}
    return found


def test_no_other_module_spells_a_name() -> None:
    found = {}
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]):
        name = path.relative_to(ROOT).as_posix()
        if name != "src/zopro/store/layout.py" and (names := spelled(path.read_text("utf-8")) - OTHERS.get(name, set())):
            found[name] = names
    assert not found, f"take these paths from zopro.store.layout: {found}"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ('run / "metrics.jsonl"', {"metrics.jsonl"}),
        ('NAME = "summary.json"', {"summary.json"}),
        ('f"{run}/config.yaml"', {"config.yaml"}),
        ('run / "policy" / f"{i:03d}"', {"policy", "000"}),
        ('run / f"trainer/{stage}"', {"trainer"}),
        ('Path(run, "sft")', {"sft"}),
        ('run.glob("iterations/*/journal.jsonl")', {"iterations", "journal.jsonl"}),
        ('run / ("sft" if first else "initial")', {"sft", "initial"}),
        ('line["policy"]; help("Writes report.html and figures/."); ", ".join(["reward"])', set()),
        ('"""RUN/metrics.jsonl"""\ndef f():\n    """usage.json"""', set()),
    ],
)
def test_the_search_sees(code: str, names: set[str]) -> None:
    assert spelled(code) == names


def test_the_names_are_those_on_users_disks(tmp_path: Path) -> None:
    run = Layout(tmp_path)
    made = {
        "sft": run.sft(),
        "initial": run.initial(),
        "policy/000": run.policy(0),
        "reward/012": run.reward(12),
        "snapshots/reward/001": run.snapshots("reward", 1),
        "iterations/1000/journal.jsonl": run.journal(1000),
        "iterations/000/samples.jsonl": run.samples(0),
        "iterations/000/preferences.jsonl": run.preferences(0),
        "evaluations/base.jsonl": run.evaluation("base"),
        "evaluations/sft.json": run.evaluation(None, ".json"),
        "evaluations/003.jsonl": run.evaluation(3),
        "trainer/sft": run.trainer("sft"),
        "trainer/refine-002/verdicts.jsonl": run.verdicts("refine", 2),
        "config.yaml": run.config(),
        "environment.json": run.environment(),
        "metrics.jsonl": run.metrics(),
        "usage.json": run.usage(),
        "data.json": run.data(),
        "engine.json": run.engine(),
        "summary.json": run.summary(),
        "analysis.json": run.analysis(),
        "report.html": run.report(),
        "figures": run.figures(),
        ".lock": run.lock(),
        ".lock.owner": run.owner(),
        "demo": run.demo(),
    }
    assert [path.relative_to(tmp_path).as_posix() for path in made.values()] == list(made)
    assert not any(tmp_path.iterdir())


def test_numbered_entries_come_in_their_order(tmp_path: Path) -> None:
    for name in ("010", "2", "000", ".003.partial", "x", "1b", "1.json"):
        (tmp_path / name).mkdir()
    assert list(numbered(tmp_path)) == [0, 2, 10]
    assert numbered(tmp_path, ".json") == {1: tmp_path / "1.json"}
    assert numbered(tmp_path / "missing") == {}


def test_examples() -> None:
    failed, tried = doctest.testmod(layout)
    assert tried and not failed
