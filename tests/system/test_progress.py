"""What goes on is said by one module: never silent for more than 5 s, few lines in a log, bars on a terminal."""

from __future__ import annotations

import io
import re
import sys

import pytest

from fake_screen import FakeScreen
from zopro.system import progress, screens
from zopro.system.progress import BEAT, Reporter, reporting, say, task
from zopro.system.screens import Plain, Terminal


class Clock:
    """Time that goes on when it is told to; the reporter's thread is called for every second of it."""

    def __init__(self) -> None:
        self.now, self.reporter, self.told = 100.0, Reporter(None), list[tuple[float, str]]()

    def __call__(self) -> float:
        return self.now

    @property
    def lines(self) -> list[str]:
        return [line for _, line in self.told]

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / BEAT)):
            self.now += BEAT
            self.reporter.beat()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of a reporter that writes plain lines; `told` has when it wrote which."""
    clock = Clock()

    class Noted(Plain):
        def line(self, text: str) -> None:
            clock.told.append((clock.now, text))

    clock.reporter = Reporter(Noted(io.StringIO()), clock)
    monkeypatch.setattr(progress, "_current", clock.reporter)
    return clock


def test_steps_are_few_lines(clock: Clock) -> None:
    with task("policy 1"):
        steps = progress.begin("", 20, "steps", 10, lasting=True)
        for done in range(11, 21):
            clock.now += 2.0
            steps.step(done)
            steps.step(done, {"reward": "0.5"})
        progress.end(steps)
    assert clock.lines == [
        "policy 1: 12/20 steps in 4 s, about 16 s left, reward 0.5",
        "policy 1: 14/20 steps in 8 s, about 12 s left, reward 0.5",
        "policy 1: 16/20 steps in 12 s, about 8 s left, reward 0.5",
        "policy 1: 18/20 steps in 16 s, about 4 s left, reward 0.5",
        "policy 1: 20/20 steps in 20 s, reward 0.5",
    ]


def test_whatever_goes_on_is_said_within_five_seconds(clock: Clock) -> None:
    with task("loading a model"):
        clock.wait(12)
    with task("policy 0"), task("", 4, "steps", lasting=True) as steps:
        for _ in range(4):
            with task("rollout"):
                clock.wait(7)
            with task("calibrating eps", unit="evaluations") as seen:
                for _ in range(3):
                    clock.wait(2)
                    seen.step()
            steps.step()
    told = [when for when, _ in clock.told]
    gaps = [after - before for before, after in zip([100.0, *told], [*told, clock.now], strict=True)]
    assert max(gaps) <= 5.0
    lines = clock.lines
    assert lines[0] == "loading a model, 4 s" and "policy 0: 0/4 steps in 4 s; rollout, 4 s" in lines
    assert any("calibrating eps, 2 evaluations" in line for line in lines)


def test_the_run_s_time_left(clock: Clock) -> None:
    progress.expect((0.0, 35.0, 300.0))
    with task("sft"), task("", 4, "steps") as steps:
        for _ in range(4):
            clock.now += 10.0
            steps.step()
    progress.expect((35.0, 100.0, 200.0))
    with task("policy 0"), task("", 4, "steps") as steps:
        for _ in range(2):  # twice the 50 s that were estimated
            clock.now += 50.0
            steps.step()
    first = "sft: 1/4 steps in 10 s, about 30 s left; the run about 6 min more"
    assert clock.lines[0] == first, "30 s, and of the rest 300 s x (10 + 5) / (8.75 + 5)"
    assert clock.lines[-1] == "policy 0: 2/4 steps in 100 s, about 2 min left; the run about 7 min more"


def test_what_is_counted_after_a_training_does_not_take_it_back(clock: Clock) -> None:
    progress.expect((0.0, 100.0, 50.0))
    with task("reward"):
        for total in (10, 2):  # the training, and then a measurement
            with task("", total, "batches") as batches:
                for _ in range(total):
                    clock.now += 10.0
                    batches.step()
    told = [line.partition("the run about ")[2] for line in clock.lines if "1/2" in line or "10/10" in line]
    assert told == ["50 s more", "65 s more"], "10 s, and of the rest 50 s x (110 + 5) / (100 + 5)"


def test_what_is_left_shrinks_while_a_step_goes_on(clock: Clock) -> None:
    progress.expect((0.0, 80.0, 160.0))
    with task("reward"), task("", 4, "steps") as steps:
        clock.now += 20.0
        steps.step()
        clock.wait(20)
    told = [re.search(r"about (\d+) s left; the run about (\d+) min more", line) for line in clock.lines]
    assert [found and found.groups() for found in told] == [
        ("60", "4"), ("56", "4"), ("52", "4"), ("48", "3"), ("44", "3"), ("40", "3"),
    ]  # fmt: skip


def test_what_is_done_once_says_nothing_of_the_pace(clock: Clock) -> None:
    with task("policy 0"), task("", 5, "steps") as steps:
        with task("calibrating eps", once=True), task("looking", once=True):
            clock.now += 300.0
        for _ in range(2):
            clock.now += 10.0
            steps.step()
    assert clock.lines[-1] == "policy 0: 2/5 steps in 320 s, about 30 s left"


def test_where_nobody_has_opened_it_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(quiet=True), task("a", 2) as seen:
        seen.step(2)
        say("a line")
    say("a line")
    assert capsys.readouterr() == ("", "")


def test_inside_another_one_it_goes_on_there(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting():
        outer = progress._current
        with reporting():
            assert progress._current is outer
        with reporting(quiet=True):
            say("not heard")
        say("heard")
    assert progress._current.screen is None and capsys.readouterr().err == "heard\n"


def test_of_many_processes_the_first_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with reporting():
        say("heard: RANK was left behind by something else")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with reporting():
        say("not heard")
    assert capsys.readouterr().err == "heard: RANK was left behind by something else\n"


def test_a_terminal_gets_bars(
    screen: FakeScreen, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", screen)
    assert isinstance(screens.screen_of(screen), Terminal)
    with monkeypatch.context() as here:
        here.setenv("TERM", "dumb")
        assert isinstance(screens.screen_of(screen), Plain), "rich would draw nothing before the end"
    with reporting():
        with task("policy 1"), task("", 20, "steps", 10, lasting=True) as steps:
            say("[bold]a line between[/bold]")
            steps.step(15, {"reward": "0.5"})
            with task("rollout"):
                pass
        assert sys.stderr is screen, "as it was"
    words = screen.words()
    assert "policy 1" in words and "15/20 steps" in words and "reward 0.5" in words and "rollout" in words
    assert "[bold]a line between[/bold]\n" in words
    assert screen.getvalue().rfind("\x1b[?25h") >= screen.getvalue().rfind("\x1b[?25l"), "the cursor is there"
    assert capsys.readouterr().out == ""
