"""The code blocks of a page, as the page has them: fenced ones by their language, indented ones as commands of a shell.

A comment that readers do not see may stand before a block, and says how the tests run it:

    <!-- test: --iterations 1 -->         options after those of its zopro commands
    <!-- test: as my_rewards.py -->       it is a file of this name
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"( *)```(\w*)$")
_NOTE = re.compile(r"<!-- test: (.*) -->$")


@dataclass(frozen=True)
class Block:
    """language: sh, python, yaml, text, or what the fence names. note: of the comment before it."""

    page: Path
    line: int
    language: str
    text: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def commands(self) -> list[str]:
        """Of a shell, without comments; lines that go on are joined."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def blocks(page: Path) -> list[Block]:
    """Of a page of Markdown, or the commands of the comments that an example begins with."""
    lines = page.read_text("utf-8").splitlines()
    return list(_of_markdown(page, lines) if page.suffix == ".md" else _of_comments(page, lines))


def _of_markdown(page: Path, lines: list[str]) -> Iterator[Block]:
    at, note = 0, ""
    while at < len(lines):
        begin, line = at, lines[at]
        at += 1
        if fence := _FENCE.fullmatch(line):
            at = lines.index(f"{fence[1]}```", at)
            yield Block(page, begin + 1, fence[2], "\n".join(lines[begin + 1 : at]) + "\n", note)
            at += 1
        elif line.startswith("    ") and not (begin and lines[begin - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            yield Block(page, begin + 1, "sh", "\n".join(text[4:] for text in lines[begin:at]).rstrip() + "\n", note)
        elif found := _NOTE.fullmatch(line):
            note = found[1]
            continue
        if line.strip():
            note = ""


def _of_comments(page: Path, lines: list[str]) -> Iterator[Block]:
    header = [line for line in lines if line.startswith("#")]
    assert header == lines[: len(header)], f"{page.name}: its comments stand first"
    typed = [line[1:].strip() for line in header if re.match(r"#   +\S", line)]
    if typed:
        first = next(at for at, line in enumerate(header, 1) if line.startswith("#   "))
        yield Block(page, first, "sh", "\n".join(typed))
