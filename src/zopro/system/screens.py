"""The two screens of `zopro.system.progress`: bars on a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

    from zopro.system.progress import Reporter, Task

BETWEEN_DRAWINGS = 0.1  # seconds


class Screen(Protocol):
    """Where a reporter shows things. between: seconds after which it wants to show again what goes on."""

    between: float

    def line(self, text: str) -> None:
        """One that stays."""

    def show(self, reporter: Reporter, now: float, due: bool) -> None:
        """What goes on. `due`: nothing has been shown for a while."""

    def ended(self, reporter: Reporter, task: Task, now: float) -> None: ...

    def close(self) -> None: ...


def screen_of(stream: TextIO) -> Screen:
    draws = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")  # where rich shows bars at their end
    return Terminal(stream) if draws else Plain(stream)


class Plain:
    """Lines, never two in a moment: what goes on where one is due, and the last state of what lasts."""

    between = 4.0

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._last: tuple[Task, int] | None = None  # of what was counted: what the last line said

    def line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def show(self, reporter: Reporter, now: float, due: bool) -> None:
        if due:
            self.line(reporter.line(now))
            reporter.shown(now)
            counted = next((task for task in reporter.tasks if task.lasting), None)
            self._last = None if counted is None else (counted, counted.done)

    def ended(self, reporter: Reporter, task: Task, now: float) -> None:
        if task.lasting and task.done > task.first and self._last != (task, task.done):
            outer = reporter.tasks[: reporter.tasks.index(task)]
            self.line(": ".join([*(t.title for t in outer[:1]), task.text(now)]))
            reporter.shown(now)

    def close(self) -> None:
        pass


class Terminal:
    """A row for each task that goes on. Those of the outermost one that lasts stay when it ends."""

    between = 1.0

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._bars: Progress | None = None
        self._rows: dict[Task, Any] = {}
        self._drawn = 0.0

    def line(self, text: str) -> None:
        if self._bars is None:
            print(text, file=self.stream, flush=True)
            return
        from rich.text import Text  # as Text: what a model says is never read as markup

        self._bars.console.print(Text(text), soft_wrap=True)

    def show(self, reporter: Reporter, now: float, due: bool) -> None:
        new = [task for task in reporter.tasks if task not in self._rows]
        if not (new or due or now - self._drawn >= BETWEEN_DRAWINGS):
            return
        self._drawn = now
        bars = self._bars = self._bars or _bars(self.stream)
        for task in new:
            self._rows[task] = bars.add_task("", total=task.total, numbers="")
        for depth, task in enumerate(reporter.tasks):
            self._update(bars, reporter, task, depth, now)
        bars.refresh()
        reporter.shown(now)

    def _update(self, bars: Progress, reporter: Reporter, task: Task, depth: int, now: float) -> None:
        left = task.left(now)
        words = [f"{now - task.began:.0f} s"]
        words += [f"about {duration(left)} left"] if left else []
        words += [task.numbers] if task.numbers else []
        rest = reporter.rest(now).lstrip("; ") if depth == 0 else ""
        of = "" if task.total is None else f"/{task.total}"
        count = f"{task.done}{of} {task.unit}".rstrip() if of or task.done else ""
        title = "  " * depth + (task.title or task.unit)
        numbers = ", ".join(filter(None, [count, *words, rest]))
        bars.update(self._rows[task], description=title, completed=task.done, numbers=numbers)

    def ended(self, reporter: Reporter, task: Task, now: float) -> None:
        if self._bars is None or task not in self._rows:
            return
        if not task.lasting and len(reporter.tasks) > 1:
            self._bars.remove_task(self._rows.pop(task))
            return
        self._update(self._bars, reporter, task, reporter.tasks.index(task), now)
        if len(reporter.tasks) == 1:
            self.close()

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars, self._rows = None, {}


def _bars(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    bars = Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[numbers]}", markup=False),
        console=Console(file=stream),
        auto_refresh=False,  # the reporter's own thread looks at the clock
        redirect_stdout=False,  # it is not ours
    )
    bars.start()
    bars.console.show_cursor(True)  # a process that is killed would leave the terminal without one
    return bars


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(7.2), duration(400), duration(9000)
    ('7 s', '7 min', '2 h 30 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
