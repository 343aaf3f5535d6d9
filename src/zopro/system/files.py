"""How many files and connections this process may have open at once."""

from __future__ import annotations

import sys
from contextlib import suppress

ENOUGH = 8192


def files_at_once() -> int:
    """As many as the system lets it have, up to `ENOUGH`: a process begins with 1024 of them, on a Mac with 256."""
    if sys.platform == "win32":
        return ENOUGH
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(ENOUGH, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # a Mac's own limit may be lower than the one it tells
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return ENOUGH if soft == resource.RLIM_INFINITY else soft
