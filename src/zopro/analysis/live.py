"""The report of a run that goes on: drawn again every few seconds, as a page that reloads itself.

    with watching("RUN"):       # in the process of the run
        ...
    python -m zopro.analysis.live RUN       # the process beside it, until its stdin is closed

A process of its own, of low priority and without torch: no step waits for a page, and the run's peak memory is its own.
When the run ends, however it ends, the last page does not reload; of a run that was killed this process draws it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from zopro.store.layout import Layout

EVERY = 5  # seconds between two pages at least, and after which a browser loads the page again
SHARE = 10  # times as long as a page takes to draw, nothing is drawn


class Ended(Protocol):
    def wait(self, timeout: float) -> bool:
        """Wait so many seconds, or until the run has ended; whether it has."""


@contextmanager
def watching(run: str | Path) -> Iterator[None]:
    """Keep RUN/report.html up to date while the block is at work. Who ends it draws the last page; where it is stopped,
    that is done here."""
    command = [sys.executable, "-m", "zopro.analysis.live", str(run)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    ended = False
    try:
        yield
        ended = True
    finally:
        process.kill()  # it may be drawing, and nothing waits for a page
        process.communicate()
        _forget(Path(run), process.pid)
        if not ended:
            _draw(Path(run), 0)


def _forget(run: Path, pid: int) -> None:
    """Remove what a killed process has left of a page."""
    from zopro.analysis.page.pages import partial_of

    with suppress(OSError):
        partial_of(Layout(run).report(), pid).unlink(missing_ok=True)


def watch(run: Path, ended: Ended) -> None:
    """Draw the page whenever there is something new, and once more without reload when the run has ended."""
    drawn, wait = 0, 0.0
    while not ended.wait(wait):
        wait = EVERY
        if (size := _size(run)) != drawn:
            began = time.perf_counter()
            _draw(run, EVERY)
            drawn, wait = size, max(EVERY, SHARE * (time.perf_counter() - began))
    _draw(run, 0)


def _size(run: Path) -> int:
    metrics = Layout(run).metrics()
    return metrics.stat().st_size if metrics.is_file() else 0


def _draw(run: Path, reload: int) -> None:
    from zopro.analysis.page.report import write_report

    if run.is_dir():
        with suppress(OSError):  # the disk is full, or the page open where that locks a file
            write_report(run, reload=reload)


def main(run: str) -> int:
    """Watch until stdin ends, which it does with the process that began this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, whose end is this one's
    with suppress(AttributeError, OSError):
        os.nice(10)
    ended = threading.Event()

    def until_closed() -> None:
        sys.stdin.buffer.read()
        ended.set()

    threading.Thread(target=until_closed, daemon=True).start()
    watch(Path(run), ended)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
