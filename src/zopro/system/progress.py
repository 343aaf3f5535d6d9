"""What is going on, on stderr: the one place that everything reports to, so that no command is silent for long.

A terminal gets bars drawn by rich. Files, pipes and logs get plain lines: one whenever something goes on and
nothing was said for some seconds. A thread that does nothing else sees to it, also while a library loads or a batch is
computed. Where nobody has opened it (`reporting`), everything is silent.

    with reporting(), task("evaluating", total=len(batches), unit="batches") as seen:
        for batch in batches:
            ...
            seen.step()
        say("one line")
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, TextIO, TypeVar

from zopro.system import ranks
from zopro.system.screens import Screen, duration, screen_of

T = TypeVar("T")

BEAT = 1.0  # seconds between looks at the clock: with `Plain.between`, nobody waits for more than 5


class Task:
    """Something that takes time. With a `total` it is counted, from `done` on; else only its seconds are shown.

    lasting: its last state is shown too. once: what it is inside of does it one time, so that it tells nothing of its
    pace. numbers: what is shown beside it, until the next ones.
    """

    once = False

    def __init__(
        self, title: str, total: int | None, unit: str, done: int, lasting: bool, reporter: Reporter, now: float
    ) -> None:
        self.title, self.total, self.unit, self.done, self.lasting = title, total, unit, done, lasting
        self.began, self.first, self.numbers = now, done, ""
        self._aside = 0.0  # seconds of what it did once
        self._last = 0.0  # how long it had worked, without those, when the last of `done` was done
        self._reporter = reporter

    def step(self, done: int | None = None, numbers: Mapping[str, str] | None = None) -> None:
        """`done` in all are done, or one more."""
        before, self.done = self.done, self.done + 1 if done is None else done
        if self.done != before:
            self._last = self._worked(self._reporter.clock())
        if numbers is not None:
            self.numbers = ", ".join(f"{name} {value}" for name, value in numbers.items())
        self._reporter.changed()

    def tell(self, text: str) -> None:
        """What goes on inside, where another process does it."""
        self.numbers = text
        self._reporter.changed()

    def _worked(self, now: float) -> float:
        return now - self.began - self._aside

    def _pace(self, now: float) -> tuple[float, float]:
        """Seconds that one takes, so far or, if it is slower, in the one that goes on; and how many of them are over."""
        worked, count = self._worked(now), self.done - self.first
        pace = max(self._last / count, worked / (count + 1)) if count else 0.0
        return pace, min(worked - self._last, pace)

    def left(self, now: float) -> float | None:
        """Seconds, at the pace so far; None where that is not known.

        >>> task = Task("", 4, "steps", 0, False, Reporter(None, lambda: 10.0), 0.0)
        >>> task.step(1)
        >>> task.left(10.0), task.left(16.0), task.left(40.0)  # the second step goes on for 0, 6 and 30 s
        (30.0, 24.0, 40.0)
        """
        if self.total is None or self.done == self.first:
            return None
        pace, begun = self._pace(now)
        return max(0.0, pace * (self.total - self.done) - begun)

    def share(self, now: float) -> float:
        """Of what it had to do when it began, done; 0 where that is not known."""
        if self.total in (None, self.first) or self.done == self.first:
            return 0.0
        pace, begun = self._pace(now)
        return min(1.0, (self.done - self.first + (begun / pace if pace else 0.0)) / (self.total - self.first))

    def text(self, now: float) -> str:
        """All that there is to say.

        >>> reporter = Reporter(None)
        >>> Task("policy 0", 20, "steps", 0, True, reporter, 0.0).text(2.0)
        'policy 0: 0/20 steps in 2 s'
        """
        seconds = f"{now - self.began:.0f} s"
        if self.total is None:
            told = ", ".join([self.title, *([f"{self.done} {self.unit}"] if self.done else []), seconds])
            return f"{told}: {self.numbers}" if self.numbers else told
        words = [f"{self.done}/{self.total} {self.unit}".rstrip() + f" in {seconds}"]
        if self.done < self.total and (left := self.left(now)) is not None:
            words.append(f"about {duration(left)} left")
        counted = ", ".join(filter(None, [*words, self.numbers]))
        return f"{self.title}: {counted}" if self.title else counted


@dataclass(frozen=True)
class Outlook:
    """Seconds that a run is estimated to take: for what is done since `began`, for its outermost task, and for the rest.

    The rest is corrected by what was right so far: twice as long as estimated makes the rest twice as long. The timed
    step that an estimate is made from (`PRIOR` seconds) counts as right, so that the first moments do not rule.
    """

    began: float
    done: float
    here: float
    left: float

    PRIOR: ClassVar[float] = 5.0

    def after(self, now: float, share: float) -> float:
        """Of the rest, where `share` of the outermost task is done.

        >>> Outlook(began=0.0, done=100.0, here=50.0, left=200.0).after(195.0, 0.0)  # 195 s for what was to take 100
        380.95...
        """
        return self.left * (now - self.began + self.PRIOR) / (self.done + self.here * share + self.PRIOR)


class Reporter:
    """What goes on, from the outermost task to the one inside all others, and a screen to show it on; None: nowhere."""

    def __init__(self, screen: Screen | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.screen, self.clock = screen, clock
        self.tasks: list[Task] = []
        self.outlook: Outlook | None = None
        self.reached = 0.0  # the largest share of the outermost task that was seen done
        self._shown = clock()
        self._lock = threading.RLock()

    def begin(self, title: str, total: int | None = None, unit: str = "", done: int = 0, lasting: bool = False) -> Task:
        with self._lock:
            task = Task(title, total, unit, done, lasting, self, self.clock())
            self.tasks.append(task)
            self._show(changed=True)
            return task

    def end(self, task: Task) -> None:
        with self._lock:
            if task in self.tasks:
                if self.screen is not None:
                    self.screen.ended(self, task, self.clock())
                self.tasks.remove(task)
                outer = self.tasks if task.once and not any(other.once for other in self.tasks) else ()
                for other in outer:
                    other._aside += self.clock() - task.began

    def say(self, line: str) -> None:
        with self._lock:
            if self.screen is not None:
                self.screen.line(line)
                self._shown = self.clock()

    def changed(self) -> None:
        with self._lock:
            self._show(changed=True)

    def beat(self) -> None:
        """Called from time to time, whatever goes on."""
        with self._lock:
            self._show(changed=False)

    def shown(self, now: float) -> None:
        """A screen says that it has just shown something."""
        self._shown = now

    def _show(self, changed: bool) -> None:
        if self.screen is None or not self.tasks:
            return
        now = self.clock()
        due = now - self._shown >= self.screen.between
        if changed or due:
            self.screen.show(self, now, due)

    def line(self, now: float) -> str:
        """What goes on as one line: the outermost task, what is counted inside it, and the innermost one."""
        first, *inside = self.tasks
        told = [task.text(now) for task in inside if task.total is not None or task is inside[-1]]
        whole = f"{first.title}: {'; '.join(told)}" if told else first.text(now)
        return whole + self.rest(now)

    def rest(self, now: float) -> str:
        """How long the run will take, where that is known."""
        counted = next((task for task in self.tasks if task.total is not None), None)
        here = None if counted is None else counted.left(now)
        if self.outlook is None or counted is None or here is None:
            return ""
        self.reached = max(self.reached, counted.share(now))  # of several that are counted, most is done in the first
        return f"; the run about {duration(here + self.outlook.after(now, self.reached))} more"


_current = Reporter(None)


@contextmanager
def reporting(quiet: bool = False, stream: TextIO | None = None) -> Iterator[None]:
    """Inside, what is reported goes to the stream (stderr), or with `quiet` nowhere. In another one that is already so.

    Of a launcher's many processes the first one speaks.
    """
    global _current
    before = _current
    if not quiet and before.screen is not None:
        yield
        return
    silent = quiet or not ranks.first()
    _current = Reporter(None if silent else screen_of(stream or sys.stderr))
    stop = threading.Event()
    if not silent:
        threading.Thread(target=_beat, args=(_current, stop), name="zopro progress", daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        if _current.screen is not None:
            _current.screen.close()
        _current = before


def _beat(reporter: Reporter, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        reporter.beat()


def begin(title: str, total: int | None = None, unit: str = "", done: int = 0, lasting: bool = False) -> Task:
    """A task for which `end` is called; `task` is the same as a context."""
    return _current.begin(title, total, unit, done, lasting)


def end(task: Task) -> None:
    task._reporter.end(task)


@contextmanager
def task(
    title: str, total: int | None = None, unit: str = "", done: int = 0, lasting: bool = False, once: bool = False
) -> Iterator[Task]:
    """Inside, this is what goes on."""
    made = begin(title, total, unit, done, lasting)
    made.once = once
    try:
        yield made
    finally:
        end(made)


def counted(things: Sequence[T], title: str, unit: str = "batches") -> Iterator[T]:
    """The things, one by one, each counted when the next one is asked for."""
    with task(title, len(things), unit) as made:
        for thing in things:
            yield thing
            made.step()


def say(line: str) -> None:
    """One line, which stays."""
    _current.say(line)


def heard() -> bool:
    """Whether anybody is told."""
    return _current.screen is not None


def expect(seconds: tuple[float, float, float] | None) -> None:
    """Seconds that a run is estimated to take: for what is done since the first call, what begins now, and the rest."""
    before = _current.outlook
    began = _current.clock() if before is None else before.began
    _current.outlook, _current.reached = (None if seconds is None else Outlook(began, *seconds)), 0.0


class Spans:
    """A `zopro.system.clock.Clock`: what a trainer does inside a step."""

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        with task(name):
            yield
