"""The report of a run that goes on: drawn when there is something new, reloading until the run has ended."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from zopro.analysis import live


def log(run: Path, reward: float) -> None:
    line = {"stage": "evaluation", "iteration": None, "reward": reward, "n": 4}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


class Script:
    """Stands for the event: does one thing after another while the watcher waits, then says that the run has ended."""

    def __init__(self, *things: Any) -> None:
        self.things, self.waited = list(things), list[float]()

    def wait(self, timeout: float) -> bool:
        self.waited.append(timeout)
        if not self.things:
            return True
        self.things.pop(0)()
        return False


def test_pages_come_with_news_and_the_last_one_stays(tmp_path: Path) -> None:
    report, pages = tmp_path / "report.html", list[str]()

    def take() -> None:
        pages.append(report.read_text("utf-8"))
        report.write_text("as it was")

    def steps() -> None:
        take()
        log(tmp_path, 0.875)

    script = Script(lambda: log(tmp_path, 0.125), steps, take, take)
    live.watch(tmp_path, script)
    first, second, third = pages
    assert '<meta http-equiv="refresh" content="5">' in first and "0.125" in first and "0.875" not in first
    assert 'http-equiv="refresh"' in second and "0.875" in second
    assert third == "as it was", "nothing new, nothing drawn"
    last = report.read_text("utf-8")
    assert "0.875" in last and 'http-equiv="refresh"' not in last
    assert script.waited[0] == 0 and min(script.waited[1:]) >= live.EVERY
    assert [path.name for path in tmp_path.iterdir()].count("report.html") == 1 and len(list(tmp_path.iterdir())) == 2


def test_the_process_ends_with_its_stdin_and_needs_no_torch(tmp_path: Path) -> None:
    log(tmp_path, 0.5)
    code = "import sys; from zopro.analysis.live import main; main(sys.argv[1]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert 'http-equiv="refresh"' not in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize("stopped", [False, True])
def test_the_watcher_goes_whatever_ends_the_run(stopped: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[Any] = []
    log(tmp_path, 0.5)

    class Process:
        pid = 4711

        def __init__(self, command: list[str], **options: Any) -> None:
            done.append(command[1:])
            (tmp_path / "report.html").write_text("reloads")
            (tmp_path / "report.html.4711.partial").write_text("half a page")

        def kill(self) -> None:
            done.append("killed")

        def communicate(self) -> None:
            done.append("waited")

    monkeypatch.setattr(live.subprocess, "Popen", Process)
    with pytest.raises(KeyboardInterrupt) if stopped else nullcontext(), live.watching(tmp_path):
        done.append("at work")
        if stopped:
            raise KeyboardInterrupt
    assert done == [["-m", "zopro.analysis.live", str(tmp_path)], "at work", "killed", "waited"]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert ("0.500" in page) if stopped else (page == "reloads"), (
        "of a run that goes on to its end it draws the last page"
    )
    assert not list(tmp_path.glob("*.partial"))
