"""A command and all that it starts, for as long as the process lives that asked for it, however that ends.

    python keeper.py COMMAND ...        # as the leader of its process group; standard input: a pipe of that process

Runs by itself and imports nothing of zopro. A byte in the pipe, or its end, is the end of the command.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

GRACE = 10.0  # seconds to end by itself
LOOK = 0.2  # seconds between two looks at the command


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # of its own group; a handler is not inherited, being ignored would be
    kept = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    while kept.poll() is None and not select.select([sys.stdin], [], [], LOOK)[0]:
        pass
    if kept.poll() is None:
        os.killpg(0, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            kept.wait(GRACE)
    os.killpg(0, signal.SIGKILL)  # what is left of it, this process too


if __name__ == "__main__":
    main()
