"""A worker ends with the process that it works for, also where that one was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from processes import gone

PATIENCE = 60.0  # seconds, however busy the machine is
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, *sys.argv[1:], str(os.getpid())])
print(child.pid, flush=True)
child.wait()
"""
WAITS = "import sys; from zopro.system.parent import end_with_parent; end_with_parent(sys.argv[1:]); input()"


@pytest.mark.parametrize("worker", ["bare", "compare", "bench"])
def test_a_worker_ends_with_a_parent_that_is_killed(worker: str, tmp_path: Path) -> None:
    """Each waits for what never comes: a line, its job, its work."""
    os.mkfifo(tmp_path / "job.json")
    arguments = {
        "bare": ["-c", WAITS],
        "compare": ["-m", "zopro.compare.worker", str(tmp_path / "job.json")],
        "bench": ["-m", "zopro.bench.worker", "two-sided"],
    }[worker]
    command = [sys.executable, "-c", PARENT, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        assert gone([child], PATIENCE)


def test_a_worker_goes_on_while_its_parent_lives() -> None:
    command = [sys.executable, "-c", WAITS, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as child:
        time.sleep(2.5)  # more than two looks
        assert child.poll() is None
        child.communicate("\n")
        assert child.returncode == 0
