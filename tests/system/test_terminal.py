"""Progress and results: rich on a terminal, plain lines everywhere else, and never a word on stdout that is no result."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest

from zopro.system import terminal
from zopro.system.terminal import Page, Progress, Table, show

HOSTILE = "[bold]a[/bold] :tea: [/]"
ROWS = [("method", "reward [95 %]"), ("zopro", "1.500 [1.000, 2.000]"), (HOSTILE, "-")]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def words(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def test_a_page_is_its_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    page = Page("head", "", Table(ROWS, right=True), "end")
    width = len(HOSTILE)
    rows = [f"{'method':<{width}}  {'reward [95 %]':>20}", f"{'zopro':<{width}}  {ROWS[1][1]}", f"{HOSTILE}  {'-':>20}"]
    plain = "\n".join(["head", "", *rows, "end"])
    assert page == plain
    show(page)
    assert capsys.readouterr() == (plain + "\n", "")


def test_a_terminal_gets_the_same_words(screen: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", screen)
    long = "runs/" + "x" * 200
    show(Page(HOSTILE, Table(ROWS), long))
    assert "─" in screen.getvalue() and "\x1b[" in screen.getvalue()
    assert screen.words().replace("─", "").split() == " ".join([HOSTILE, *map(" ".join, ROWS), long]).split()


def test_plain_progress_is_few_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    progress = Progress("policy 1", total=20, done=10)
    for done in range(11, 21):
        now += 4.0
        progress.step(done)
        progress.step(done, {"loss": 0.5})
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "policy 1: 13/20 steps in 12 s, about 28 s left, loss 0.5",
        "policy 1: 16/20 steps in 24 s, about 16 s left, loss 0.5",
        "policy 1: 19/20 steps in 36 s, about 4 s left, loss 0.5",
        "policy 1: 20/20 steps in 40 s, loss 0.5",
    ]


def test_nothing_done_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("sft", total=5, done=5).close()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_one_bar(
    screen: Terminal, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress("policy 1", total=20, done=10)
    print("a line between", file=sys.stderr)
    progress.step(15, {"loss": 0.5})
    progress.close()
    assert sys.stderr is screen, "as it was"
    assert "policy 1" in screen.words() and "15/20" in screen.words() and "loss 0.5" in screen.words()
    assert "a line between\n" in screen.words()
    assert screen.getvalue().rfind("\x1b[?25h") >= screen.getvalue().rfind("\x1b[?25l"), "the cursor is there"
    assert capsys.readouterr().out == ""


def test_rich_waits_for_a_terminal() -> None:
    """Nothing that is printed to a pipe pays for its import."""
    code = "import sys; from zopro.system.terminal import *; show(Page(Table([['a']]))); Progress('t', 2).close()"
    code += "; assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
