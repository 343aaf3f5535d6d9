"""What the package imports: what pip installs with it, and on which systems it is there."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from test_house import IMPORTS, SOURCE, SOURCES, names_used

# Library -> what pip calls it, where that is another name.
DISTRIBUTIONS = {"yaml": "pyyaml", "umap": "umap-learn"}

TOOLS = {"dev", "docs"}  # extras of programs that the package does not import

# Not on every system: modules, which only a function may import, and names, which have no place in the package.
NOT_EVERYWHERE = {"fcntl", "grp", "msvcrt", "posix", "pty", "pwd", "resource", "termios", "winreg"}

ONLY_LINUX = {"fork", "forkpty", "memfd_create", "prctl", "sched_getaffinity", "sched_setaffinity", "SIGRTMIN", "epoll"}


def imported_at_once(source: str) -> set[str]:
    """What a module imports when it is imported, rather than when a function is called."""
    found, left = set(), list(ast.parse(source).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            left += ast.iter_child_nodes(node)
    return found


def test_what_the_code_imports_is_what_pip_installs() -> None:
    """Every library is declared, with a lower bound or, where its interface is not stable, a version; and no other."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras if name not in TOOLS for line in extras[name])]
    declared = [re.fullmatch(r"([\w-]+)(?:\[[\w,-]+\])?[>=]=[\d.]+", line) for line in lines]
    assert all(declared), "NAME>=VERSION, or NAME==VERSION where an interface is not stable, one a line"
    libraries = (
        {name.split(".")[0] for imports in IMPORTS.values() for name in imports.found}
        - sys.stdlib_module_names
        - {"zopro"}
    )
    assert {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in libraries} == {
        found[1] for found in declared if found
    }


def test_every_module_can_be_imported_on_a_mac() -> None:
    """What only some systems have is imported where it is called, behind what does without it."""
    found = {
        f"{module}: {name}"
        for module, source in SOURCES.items()
        for name in imported_at_once(source) & NOT_EVERYWHERE | names_used(source) & ONLY_LINUX
    }
    assert not found, f"import it inside the function, and have another way: {sorted(found)}"
    assert imported_at_once("try:\n import fcntl\nexcept OSError: pass\ndef f():\n import pwd") == {"fcntl"}
