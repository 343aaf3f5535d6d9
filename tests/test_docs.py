"""The pages hang together: links and anchors lead somewhere, the menu has every page, the Python page every name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import zopro
from zopro.store.rundir import FREE, MAY_RISE

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MOVED = DOCS / "results.md"  # not on the site
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
_LINK = re.compile(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
_FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.M | re.S)


def prose(text: str) -> str:
    """A page without code: neither blocks nor quoted words."""
    blocks = re.sub(r"(?m)^(?: {4}(?! *[-*0-9]).*\n?)+", "", _FENCED.sub("", text))
    return re.sub(r"`[^`\n]*`", "", blocks)


def anchors(text: str) -> set[str]:
    """Of a page's headings, as the site and code hosts make them."""
    heads = re.findall(r"(?m)^#{1,6} +(.+?) *$", _FENCED.sub("", text))
    words = [re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head)) for head in heads]
    return {re.sub(r"\s+", "-", word.strip().lower()) for word in words}


def broken(page: Path, text: str) -> Iterator[str]:
    """Links of a page that lead nowhere in the repository."""
    for link in _LINK.findall(prose(text)):
        place, _, anchor = link.partition("#")
        target = page if not place else (page.parent / place).resolve()
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not list(broken(page, text))
    if DOCS in page.parents:  # the site has nothing but docs/
        outside = [
            link for link in _LINK.findall(prose(text)) if link.startswith("../" * len(page.relative_to(DOCS).parts))
        ]
        assert not outside


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "CHANGELOG"], ids=lambda page: page.name)
def test_files_that_it_names_are_there(page: Path) -> None:
    named = re.findall(r"(?<![\w/])(?:src|tests|benchmarks|examples)/[\w./-]+\.\w+", page.read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_a_broken_link_is_seen() -> None:
    text = "# A b\n[x](#a-b) [x](nowhere.md) [x](data.md#nothing)\n\n    [x](code.md)\n\n`[x](quoted.md)` [x](faq.md)"
    assert list(broken(DOCS / "new.md", text.replace("#a-b", "faq.md"))) == ["nowhere.md", "data.md#nothing"]
    assert anchors("## `zopro run`, [twice](x.md): 1 + 1?\n```\n# no\n```\n") == {"zopro-run-twice-1-1"}


def test_the_quickstart_asks_for_the_versions_that_pip_does() -> None:
    told = (DOCS / "quickstart.md").read_text("utf-8").split("## Install\n")[1].split("\n## ")[0].lower()
    declared = (ROOT / "pyproject.toml").read_text("utf-8")
    found = re.findall(r"(python|torch|transformers|trl|peft) (\d+\.\d+)", told)
    assert len(found) == 5
    for name, version in found:
        assert re.search(rf'{name}"? ?[>=]+ ?"?(>=)?{re.escape(version)}"', declared), (name, version)


def test_the_menu_has_every_page_once() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    listed = [page for section in menu for pages in section.values() for entry in pages for page in entry.values()]
    assert sorted(listed) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if p != MOVED)


def test_the_python_page_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text("utf-8")
    assert set(re.findall(r'heading: "zopro\.(\w+)"', page)) == {*zopro.__all__} - {"__version__"}
    listed = "".join(re.findall(r"(?m)^\|(.*?)\|", page.partition("\n## ")[0]))
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted({*zopro.__all__} - {"__version__"})
    homes = {f"{home}.{name}" for name, home in zopro._HOME.items()}
    assert set(re.findall(r"(?m)^::: (\S+)$", page)) == homes


def crooked(text: str) -> Iterator[str]:
    """Lines of tables that are no row, or have another number of cells than the line under the head."""
    wanted = 0
    for line in _FENCED.sub("", text).splitlines():
        cells = re.sub(r"`[^`]*`|\\\|", "", line.strip()).count("|")
        if re.fullmatch(r"\|(?:\s*:?-+:?\s*\|)+", line.strip()):
            wanted = cells
        elif not line.strip():
            wanted = 0
        elif wanted and not (line.strip().startswith("|") and line.strip().endswith("|") and cells == wanted):
            yield line


def test_a_crooked_row_is_seen() -> None:
    table = "| a | b |\n|---|---|\n| 1 | `x|y` |\n"
    assert not [*crooked(table + "\nprose | with | marks\n")]
    assert [*crooked(table + "@LATER| 1 | 2 |\n")] == ["@LATER| 1 | 2 |"]
    assert [*crooked(table + "| 1 |\n")] == ["| 1 |"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_whole(page: Path) -> None:
    assert not [*crooked(page.read_text(encoding="utf-8"))]


def test_the_keys_that_a_resumed_run_may_change_are_told() -> None:
    section = (DOCS / "reliability.md").read_text("utf-8").split("## Which keys may change\n")[1].split("\n## ")[0]
    listed = section[section.index("comes of it:") : section.index("Any other")]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted((*FREE, "engine", MAY_RISE))  # an engine at other addresses
