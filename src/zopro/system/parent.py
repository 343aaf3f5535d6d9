"""The end of a process that works for another when that other one has ended, however it did: by a signal, say."""

from __future__ import annotations

import os
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
