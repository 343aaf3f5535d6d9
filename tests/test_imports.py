"""The import rules: data flows one way, so that a part can be read, tested and replaced without the parts after it."""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


class Imports(ast.NodeVisitor):
    """Every module a file imports, also inside functions; what only type checkers see is left out."""

    def __init__(self, module: str, is_package: bool, known: set[str]) -> None:
        self.package = module if is_package else module.rpartition(".")[0]
        self.known = known
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parents = self.package.split(".")
        base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
        origin = ".".join(filter(None, [base, node.module]))
        for alias in node.names:
            submodule = f"{origin}.{alias.name}"
            self.found.add(submodule if submodule in self.known else origin)


def imports_of(source: str, module: str, is_package: bool = False, known: set[str] | None = None) -> set[str]:
    visitor = Imports(module, is_package, set(MODULES) if known is None else known)
    visitor.visit(ast.parse(source))
    return visitor.found


IMPORTS = {
    module: imports_of(path.read_text("utf-8"), module, path.name == "__init__.py") for module, path in MODULES.items()
}


def within(module: str, *packages: str) -> bool:
    return any(module == f"zopro.{package}" or module.startswith(f"zopro.{package}.") for package in packages)


def offenders(importers: tuple[str, ...], forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{module} imports {found}"
        for module, imported in IMPORTS.items()
        if within(module, *importers)
        for found in imported
        if within(found, *forbidden)
    ]


def test_the_parser_sees_every_kind_of_import():
    source = """
import torch.nn
from zopro import errors
from .sibling import thing
from .. import pipeline
if TYPE_CHECKING:
    import hidden
def f():
    from zopro.trainer import Trainer
"""
    known = {"zopro.errors", "zopro.zo.sibling", "zopro.pipeline", "zopro.trainer"}
    found = imports_of(source, "zopro.zo.module", known=known)
    assert found == {"torch.nn", "zopro.errors", "zopro.zo.sibling", "zopro.pipeline", "zopro.trainer"}


@pytest.mark.parametrize("package", ["zo", "objectives"])
def test_the_core_imports_only_torch(package):
    allowed = {*sys.stdlib_module_names, "torch"}
    for module, imported in IMPORTS.items():
        if within(module, package):
            foreign = {name for name in imported if name.split(".")[0] not in allowed}
            assert not {name for name in foreign if not within(name, package, "errors")}, module


def test_engine_and_tasks_know_no_training():
    trainers = ("trainer", "zopro_trainer", "rloo", "guided_trainer", "online_dpo")
    assert not offenders(("engine", "tasks"), (*trainers, "pipeline", "compare", "rewards", "methods", "demo", "cli"))


def test_analysis_reads_run_directories_only():
    for module, imported in IMPORTS.items():
        if within(module, "analysis"):
            ours = {name for name in imported if name.startswith("zopro.")}
            assert all(within(name, "analysis", "config", "errors", "rundir", "threads") for name in ours), module
            assert not {name.split(".")[0] for name in imported} & {"transformers", "trl", "peft", "datasets"}, module


def test_only_the_commands_import_the_pipeline():
    importers = tuple(name for name in _top_level() if name not in ("cli", "demo", "compare", "pipeline"))
    assert not offenders(importers, ("pipeline", "compare"))
    assert not offenders(tuple(name for name in _top_level() if name != "__main__"), ("cli",))


def _top_level() -> set[str]:
    return {module.split(".")[1] for module in MODULES if "." in module}


def test_there_are_no_cycles():
    graph = {module: {name for name in found if name in MODULES} for module, found in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")
