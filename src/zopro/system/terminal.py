"""What people see: progress on stderr, results with tables on stdout.

A terminal gets them drawn by rich; files, pipes and logs get plain lines.

    progress = Progress("policy 1", total=40)
    progress.step(10, {"loss": 0.25})
    progress.close()
    show(Page("finished", "", Table([("stage", "seconds"), ("sft", "1.5")])))
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

BETWEEN_LINES = 10.0  # seconds from one plain line of progress to the next
BETWEEN_DRAWINGS = 0.1


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


class Progress:
    """How far a loop is: one bar on a terminal, else a line every ten seconds and one at the end.

    Args:
        title: what is being done.
        total: steps in all.
        done: steps that were done before.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._first, self._began, self._numbers = done, time.monotonic(), ""
        self._shown_at, self._shown = self._began, done
        self._bar = _bar(title, total, done) if sys.stderr.isatty() else None

    def step(self, done: int, numbers: Mapping[str, float] | None = None) -> None:
        """`done` steps are done; `numbers` are shown beside them until the next ones."""
        self.done = done
        if numbers is not None:
            self._numbers = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        if time.monotonic() - self._shown_at >= (BETWEEN_LINES if self._bar is None else BETWEEN_DRAWINGS):
            self._show()

    def close(self) -> None:
        """Show the last state and end the line."""
        if self._bar is not None:
            self._show()
            self._bar.stop()
        elif self.done != self._shown:
            self._show()

    def _show(self) -> None:
        self._shown_at, self._shown = time.monotonic(), self.done
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, numbers=self._numbers, refresh=True)
            return
        seconds = self._shown_at - self._began
        left = seconds / max(1, self.done - self._first) * (self.total - self.done)
        words = [f"{self.title}: {self.done}/{self.total} steps in {seconds:.0f} s"]
        words += [f"about {left:.0f} s left"] if self.done < self.total else []
        print(", ".join(filter(None, [*words, self._numbers])), file=sys.stderr, flush=True)


def _bar(title: str, total: int, done: int) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        console=Console(stderr=True),
        auto_refresh=False,  # no thread beside the training
        redirect_stdout=False,  # it is not ours
    )
    bar.add_task(title, total=total, completed=done, numbers="")
    bar.start()
    bar.console.show_cursor(True)  # a process that is killed would leave the terminal without one
    return bar
