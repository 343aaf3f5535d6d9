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


@pytest.mark.parametrize("columns", [24, 30, 33, 34, 40, 60, 80])
def test_no_width_of_a_terminal_cuts_a_word(columns: int, screen: FakeScreen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich puts an ellipsis for the end of a number; too narrow a terminal gets a line for each cell."""
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = [
        ("200 held-out prompts", "reward [95 %]", "KL per answer", ""),
        ("iteration 0", "0.329 [-0.282, 0.939]", "3.370", ""),
        ("rloo-checkpointed", "-", "", "more"),
    ]
    show(Page(Table(rows, right=True)))
    said = screen.words()
    assert "…" not in said and {word for row in rows[1:] for cell in row for word in cell.split()} <= set(said.split())
    first = "200 held-out prompts\niteration 0\n  reward [95 %]: 0.329 [-0.282, 0.939]\n  KL per answer: 3.370\n"
    stacked = f"{first}rloo-checkpointed\n  reward [95 %]: -\n  more"
    assert (stacked in said) == (columns < 46) != ("─" in said)
    assert columns < 46 or max(map(len, said.splitlines())) <= columns


def test_rich_waits_for_a_terminal() -> None:
    """Nothing that is printed to a pipe pays for its import."""
    code = (
        "import sys; from zopro.system.progress import *; from zopro.system.terminal import *; show(Page(Table([['a']])))"
    )
    code += "\nwith reporting(), task('t', 2) as t: t.step()\nassert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
