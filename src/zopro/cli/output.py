"""stdout and stderr as a process finds them: closed, full, read by nobody, or of an encoding that lacks characters.

zopro methods --json > /dev/full        # one line, exit code 1
"""

from __future__ import annotations

import io
import json
import os
import select
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from zopro.store.durable import plain


def opened() -> None:
    """Open what the process was started without, and let no character be one that cannot be printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - lasts as the process does
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def as_json(result: Mapping[str, Any]) -> None:
    """Print one object. JSON has escapes of its own for characters that stdout lacks."""
    every = "utf" in (sys.stdout.encoding or "utf").lower()
    print(json.dumps(plain(result), ensure_ascii=not every, allow_nan=False))


def drop() -> None:
    """Let what stdout does not take go nowhere, or Python complains at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def unread() -> bool:
    """Whether nobody reads stdout or stderr any more."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a test's has no descriptor
            poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
