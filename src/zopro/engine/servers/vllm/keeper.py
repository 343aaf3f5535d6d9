"""A command and all that it starts, for as long as the process lives that asked for it, however that ends.

    python keeper.py LOG COMMAND ...    # as the leader of its process group; standard input: a pipe of that process

Runs by itself and imports nothing of zopro. A byte in the pipe, or its end, is the end of the command, and of the file
LOG that it writes to; where the command ends by itself the file stays, for that process to read.
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
    log, command = sys.argv[1], sys.argv[2:]
    kept = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while kept.poll() is None and not select.select([sys.stdin], [], [], LOOK)[0]:
        pass
    if kept.poll() is None:
        os.killpg(0, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            kept.wait(GRACE)
        with suppress(OSError):
            os.unlink(log)
    os.killpg(0, signal.SIGKILL)  # what is left of it, this process too


if __name__ == "__main__":
    main()
