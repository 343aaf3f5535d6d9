"""Results: tables drawn by rich on a terminal, plain lines everywhere else."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fake_screen import FakeScreen
from zopro.system.terminal import Page, Table, show

HOSTILE = "[bold]a[/bold] :tea: [/]"
ROWS = [("method", "reward [95 %]"), ("zopro", "1.500 [1.000, 2.000]"), (HOSTILE, "-")]


def test_a_page_is_its_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    page = Page("head", "", Table(ROWS, right=True), "end")
    width = len(HOSTILE)
    rows = [f"{'method':<{width}}  {'reward [95 %]':>20}", f"{'zopro':<{width}}  {ROWS[1][1]}", f"{HOSTILE}  {'-':>20}"]
    plain = "\n".join(["head", "", *rows, "end"])
    assert page == plain
    show(page)
    assert capsys.readouterr() == (plain + "\n", "")


def test_a_terminal_gets_the_same_words(screen: FakeScreen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", screen)
    long = "runs/" + "x" * 200
    show(Page(HOSTILE, Table(ROWS), long))
    assert "─" in screen.getvalue() and "\x1b[" in screen.getvalue()
    assert screen.words().replace("─", "").split() == " ".join([HOSTILE, *map(" ".join, ROWS), long]).split()


def test_rich_waits_for_a_terminal() -> None:
    """Nothing that is printed to a pipe pays for its import."""
    code = (
        "import sys; from zopro.system.progress import *; from zopro.system.terminal import *; show(Page(Table([['a']])))"
    )
    code += "\nwith reporting(), task('t', 2) as t: t.step()\nassert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
