"""Processes that work for another one: the end of one whose parent has ended, and the signal that killed one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence

LOOK = 1.0  # seconds between two looks at the parent


def end_with_parent(arguments: Sequence[str]) -> None:
    """End this process at once, with exit code 1, when its parent has ended. What it was writing is left as by a crash.

    Args:
        arguments: the parent's process id, which it alone knows for certain; empty: started by hand, nothing is done.
    """
    for parent in arguments:
        threading.Thread(target=_until_orphaned, args=(int(parent),), daemon=True).start()


def _until_orphaned(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)


def killed(code: int) -> str:
    """Which signal killed a process, by its negative exit code, and the likely cause.

    >>> killed(-15)
    'killed by SIGTERM'
    """
    name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
    cause = "; most likely the memory was full. Lower what goes through the model at once, or take a smaller model"
    return f"killed by {name}{cause if name == 'SIGKILL' else ''}"
