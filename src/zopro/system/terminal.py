"""Results with tables on stdout: drawn by rich on a terminal, plain lines in files and pipes.

show(Page("finished", "", Table([("stage", "seconds"), ("sft", "1.5")])))
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Table:
    """Rows of cells, the heads first. `right` aligns all columns but the first to the right, as numbers are read.

    >>> print(Table([("", "step"), ("sampling", "0.25 s")], right=True))
                step
    sampling  0.25 s
    """

    rows: Sequence[Sequence[str]]
    right: bool = False

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        sides = ["<", *(">" if self.right else "<") * (len(widths) - 1)]
        return "\n".join(
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
            for row in self.rows
        )


class Page(str):
    """Texts and tables, one below the other. As a string it is the plain form; `show` knows the tables."""

    blocks: tuple[str | Table, ...]

    def __new__(cls, *blocks: str | Table) -> Page:
        page = super().__new__(cls, "\n".join(map(str, blocks)))
        page.blocks = blocks
        return page


def show(text: str) -> None:
    """Print a result to stdout."""
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout)
    for block in text.blocks if isinstance(text, Page) else (text,):
        if isinstance(block, Table):
            _draw(console, block)
        else:  # as Text: what a model says is never read as markup
            console.print(Text(block), soft_wrap=True)


def _draw(console: Console, table: Table) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, head in enumerate(table.rows[0]):
        drawn.add_column(Text(head), justify="right" if table.right and index else "left")
    for row in table.rows[1:]:
        drawn.add_row(*map(Text, row))
    console.print(drawn)
