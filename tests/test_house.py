"""Who may import whom: one table, held against every import in the package.

Data flows one way, so that a part can be read, tested and replaced without the parts after it. A module belongs to the
room that its first folder names. Modules that still lie flat have theirs in HOME.

    python tests/test_house.py         # what the tables do not allow
"""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

# Room -> the rooms it may import, besides itself. Later lines use earlier ones.
MAY_IMPORT = {
    "errors": "",
    "choices": "errors",
    "reference": "",
    "objectives": "",
    "system": "errors",
    "config": "errors choices",
    "tasks": "errors choices",
    "zo": "errors choices",
    "text": "errors choices system config",
    "weights": "errors",
    "store": "errors choices system config zo",
    "engine": "errors choices system config text zo weights store",
    "judges": "errors choices system config text tasks store",
    "analysis": "errors choices system config text weights store",
    "train": "errors choices system config text objectives zo weights store engine",
    "functions": "errors choices tasks",  # rewards/functions
    "rewards": "errors choices system config text objectives zo weights store engine tasks train functions",
    "loop": "errors choices system config text objectives zo weights store engine judges tasks analysis train functions "
    "rewards",
    "bench": "errors choices system config text objectives zo weights store engine train rewards",
    "compare": "errors choices system config text weights store engine judges tasks analysis train rewards loop",
    "demo": "errors choices system config text weights store tasks loop",
    "cli": "errors choices system config text store tasks analysis loop bench compare demo",
    "front": "errors system config zo train loop",  # zopro/__init__.py, which imports the public names on first use
}

# Room -> the libraries it may import, besides Python's own; rooms that are not here may import any but those of ONLY.
LIBRARIES = {
    "errors": "",
    "choices": "",
    "reference": "torch",
    "objectives": "torch",
    "zo": "torch",
    "system": "torch numpy scipy accelerate rich",
    "config": "yaml pydantic",
    "tasks": "datasets pyarrow rouge_score sacrebleu",
    "functions": "math_verify",
    "text": "transformers tokenizers torch py3langid",
    "weights": "torch safetensors peft",
    "store": "torch yaml filelock",
    "judges": "torch openai",
    "analysis": "numpy scipy torch threadpoolctl matplotlib plotly jinja2 markupsafe yaml openTSNE umap",
    "compare": "torch transformers matplotlib",
    "cli": "",
    "front": "",
}

# What few rooms may use: imports by their beginning, or names in the code.
ONLY = {
    "sockets": (
        {"engine.servers", "judges.endpoint"},
        {"socket", "ssl", "socketserver", "http.client", "http.server", "urllib.request", "requests", "httpx", "aiohttp",
         "websockets", "openai"},
    ),
    "Triton and CUDA graphs": (
        {"engine.gpu"},
        {"triton", "CUDAGraph", "make_graphed_callables", "graph_pool_handle", "cudagraph_mark_step_begin"},
    ),
    "files of named tensors": (
        {"weights"},
        {"safe_open", "load_file", "save_file"},
    ),
    "TRL's trainers": (
        {"train", "rewards", "loop", "bench"},
        {"trl"},
    ),
}  # fmt: skip

# Modules that lie flat, and the rooms they belong to.
HOME = {
    "__main__": "cli",
    "launch": "front",  # an old name, which stays
}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


class Imports(ast.NodeVisitor):
    """Every module that a file imports, also inside functions; `typed` has what only type checkers see."""

    def __init__(self, module: str, is_package: bool, known: set[str]) -> None:
        self.package = module if is_package else module.rpartition(".")[0]
        self.known = known
        self.found: set[str] = set()
        self.typed: set[str] = set()
        self._into = self.found

    def visit_If(self, node: ast.If) -> None:
        self._into = self.typed if "TYPE_CHECKING" in ast.unparse(node.test) else self._into
        for statement in node.body:
            self.visit(statement)
        self._into = self.found
        for statement in node.orelse:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        self._into |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parents = self.package.split(".")
        base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
        origin = ".".join(filter(None, [base, node.module]))
        for alias in node.names:
            submodule = f"{origin}.{alias.name}"
            self._into.add(submodule if submodule in self.known or submodule in _EXACT else origin)


_EXACT = {name for _, names in ONLY.values() for name in names if "." in name}  # `from urllib import request`


def imports_of(source: str, module: str, is_package: bool = False, known: set[str] | None = None) -> Imports:
    visitor = Imports(module, is_package, set(MODULES) if known is None else known)
    visitor.visit(ast.parse(source))
    return visitor


SOURCES = {module: path.read_text("utf-8") for module, path in MODULES.items()}
IMPORTS = {module: imports_of(SOURCES[module], module, path.name == "__init__.py") for module, path in MODULES.items()}
ALL = {module: found.found | found.typed for module, found in IMPORTS.items()}


def place(module: str) -> str:
    """Where a module of the package is, or is going, without the package's name."""
    inside = module.removeprefix("zopro").removeprefix(".")
    return HOME.get(inside, inside) or "front"


def room(module: str) -> str:
    """The room of a module; `objectives` and the rewards' `functions` are rooms of their own, which lie in others."""
    where = place(module).split(".")
    inner = next((name for name in ("objectives", "functions") if name in where[1:2]), None)
    return inner or where[0]


def ours(modules: set[str]) -> set[str]:
    return {name for name in modules if name in MODULES and name != "zopro"}


def names_used(source: str) -> set[str]:
    """Names and attributes in the code."""
    nodes = list(ast.walk(ast.parse(source)))
    return {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {n.id for n in nodes if isinstance(n, ast.Name)}


def trainers_derived_from(source: str) -> set[str]:
    """Trainers that classes of a module derive from: they override hooks that are private to TRL or transformers."""
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return {name for c in classes for base in c.bases if (name := ast.unparse(base).split(".")[-1]).endswith("Trainer")}


def uses(rule: str, imported: set[str], names: set[str]) -> set[str]:
    """What `rule` keeps for few rooms, of a module's imports and names."""
    guarded = ONLY[rule][1]
    return {x for x in guarded if any(name == x or name.startswith(f"{x}.") for name in imported)} | (guarded & names)


def broken() -> set[str]:
    """Every import, library, name or derived trainer that the tables do not allow."""
    lines = set()
    for module, imported in ALL.items():
        allowed = {room(module), *MAY_IMPORT.get(room(module), "").split()}
        lines |= {f"{module} imports {found}" for found in ours(imported) if room(found) not in allowed}
        libraries = {name.split(".")[0] for name in imported} - sys.stdlib_module_names - {"zopro"}
        if room(module) in LIBRARIES:
            lines |= {f"{module} imports {name}" for name in libraries - set(LIBRARIES[room(module)].split())}
        for rule, (rooms, _) in ONLY.items():
            if not any(f"{place(module)}.".startswith(f"{allowed}.") for allowed in rooms):
                lines |= {f"{module} uses {name}" for name in uses(rule, imported, names_used(SOURCES[module]))}
        if room(module) != "train":
            lines |= {f"{module} derives from {name}" for name in trainers_derived_from(SOURCES[module])}
    return lines


def test_every_module_has_a_room() -> None:
    homeless = {module for module in MODULES if room(module) not in MAY_IMPORT}
    assert not homeless, f"put them into a folder of MAY_IMPORT: {sorted(homeless)}"
    gone = {name for name in HOME if f"zopro.{name}" not in MODULES}
    assert not gone, f"moved: delete their lines in HOME: {sorted(gone)}"


def test_the_table_has_no_circles_and_no_unknown_rooms() -> None:
    graph = {name: set(allowed.split()) for name, allowed in MAY_IMPORT.items()}
    assert set().union(*graph.values(), LIBRARIES) <= graph.keys()
    TopologicalSorter(graph).prepare()


def test_imports_follow_the_table() -> None:
    assert not broken(), f"against the table: {sorted(broken())}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: ours(found.found) for module, found in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_no_file_is_longer_than_300_lines() -> None:
    texts = {path: path.read_text("utf-8") for path in [*MODULES.values(), *Path(__file__).parent.rglob("*.py")]}
    long = {path.name: lines for path, text in texts.items() if (lines := len(text.splitlines())) > 300}
    assert not long, f"one idea a file; split them: {long}"


def test_the_parser_sees_every_kind_of_import() -> None:
    source = """
import torch.nn
from zopro import errors
from .sibling import thing
from .. import pipeline
from urllib import request
if TYPE_CHECKING:
    import hidden
else:
    import shown
def f():
    from zopro.trainer import Trainer
    with suppress(ImportError):
        import triton.language as tl
"""
    known = {"zopro.errors", "zopro.zo.sibling", "zopro.pipeline", "zopro.trainer"}
    found = imports_of(source, "zopro.zo.module", known=known)
    assert found.found == {"torch.nn", "urllib.request", "shown", "triton.language", *known}
    assert found.typed == {"hidden"}
    assert uses("sockets", found.found, set()) == {"urllib.request"}
    assert uses("Triton and CUDA graphs", found.found, names_used("torch.cuda.CUDAGraph()")) == {"triton", "CUDAGraph"}
    assert trainers_derived_from("class A(Mixin, trl.RLOOTrainer): ...") == {"RLOOTrainer"}
    assert not uses("sockets", imports_of("from urllib.parse import urlparse", "zopro.zo.module").found, set())


@pytest.mark.parametrize(
    ("module", "where"),
    [("zopro", "front"), ("zopro.zo", "zo"), ("zopro.zo.spsa", "zo"), ("zopro.train.objectives", "objectives")],
)
def test_rooms_are_named_by_the_first_folder(module: str, where: str) -> None:
    assert room(module) == where


if __name__ == "__main__":
    print("\n".join(sorted(broken())))
