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

GAP = 3  # between two columns that are drawn: the box's, and a space on either side


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
    """A table as wide as the terminal at most; where its longest words do not fit side by side, a line for each cell."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Drawn
    from rich.text import Text

    heads, *rows = table.rows
    if not (widths := _widths(table, console.width)):
        console.print(Text(heads[0]), soft_wrap=True)
        for row in rows:
            cells = [(head, cell) for head, cell in zip(heads[1:], row[1:], strict=True) if cell]
            lines = [row[0], *(f"  {head}: {cell}" if head else f"  {cell}" for head, cell in cells)]
            console.print(Text("\n".join(lines)), soft_wrap=True)
        return
    drawn = Drawn(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, (head, width) in enumerate(zip(heads, widths, strict=True)):
        drawn.add_column(Text(head), justify="right" if table.right and index else "left", width=width)
    for row in rows:
        drawn.add_row(*map(Text, row))
    console.print(drawn)


def _widths(table: Table, room: int) -> list[int]:
    """Of the columns, in which every word is whole; rich would cut those of a narrow one. Empty where they do not fit."""
    from rich.cells import cell_len

    columns = list(zip(*table.rows, strict=True))
    widths = [max(cell_len(line) for cell in column for line in cell.splitlines() or [""]) for column in columns]
    least = [max(cell_len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    room -= GAP * (len(columns) - 1)
    while sum(widths) > room and widths != least:
        widest = max(range(len(widths)), key=lambda index: (widths[index] > least[index], widths[index]))
        widths[widest] -= 1
    return widths if sum(widths) <= room else []
