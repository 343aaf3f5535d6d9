"""`zopro run` in a forked process that can be watched and killed; forking saves importing the libraries."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


class Run:
    """`zopro run` in a forked process.

    Args:
        crashes_at: a pattern of paths under `out`; the process kills itself as soon as it has made one of them.
    """

    def __init__(self, config: Path, out: Path, *options: str, crashes_at: str | None = None) -> None:
        self.began = time.perf_counter()
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            for descriptor in (1, 2):
                os.dup2(writing, descriptor)
            if crashes_at is not None:
                _crash_at(out, crashes_at)
            os._exit(zopro_here(["run", str(config), "--output_dir", str(out), *options]))
        os.close(writing)
        self._text: list[str] = []
        self._reader = threading.Thread(target=self._read, args=(reading,))
        self._reader.start()

    def _read(self, descriptor: int) -> None:
        with open(descriptor, encoding="utf-8", errors="replace") as stream:
            self._text += stream.readlines()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.began

    def running(self, due: Callable[[], bool]) -> bool:
        """Wait until `due()`; whether it is still running then."""
        while not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if due():
                return True
            time.sleep(0.002)
        return False

    def end(self) -> tuple[int, str, float]:
        """Exit code (negative: the signal that ended it), last line of output, seconds since the start."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        seconds = self.seconds
        self._reader.join()
        lines = [line.strip() for line in self._text if line.strip()]
        return code, lines[-1] if lines else "", seconds


def _crash_at(out: Path, pattern: str) -> None:
    """SIGKILL as soon as a path of the pattern gets its name: zopro gives names by `os.replace` alone."""
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target) in out.glob(pattern):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace  # type: ignore[assignment]


def zopro_here(argv: list[str]) -> int:
    """`zopro ARGV` in a process that was forked just now; its exit code."""
    import torch

    from zopro.cli import main

    # Torch makes a fork's thread pool anew at its first use: two threads that load a model would race for it.
    torch.set_num_threads(torch.get_num_threads())
    try:
        return main(argv)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
