"""Whether processes that a test began, or that these began, have ended."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence


def gone(processes: Sequence[int], patience: float = 10.0) -> bool:
    """Whether nothing is left of any of them, within so many seconds."""
    until = time.monotonic() + patience
    while any(map(_lives, processes)):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _lives(process: int) -> bool:
    """Whether it is there, and not a zombie that nobody has waited for."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")
