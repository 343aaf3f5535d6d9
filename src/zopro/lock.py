"""One process on one run directory: a second one is refused, and a dead one's lock holds nobody up.

The lock is the kernel's (POSIX record lock on RUN/.lock), so it ends with its process however that ends; the file only
says who it is. Within one process a directory can be locked again: the lock goes when the last holder lets go.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from zopro.errors import InputError

logger = logging.getLogger(__name__)

FILE = ".lock"
_held: dict[Path, tuple[IO[str], int]] = {}  # closing any handle of a file ends the process's lock: one for each


class RunLock:
    """The right to write to one run directory.

    Ranks of one job share it: only the first takes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key: Path | None = None

    def acquire(self) -> None:
        """Take the lock; taking it twice is taking it once. Raises InputError: another process has it."""
        if self._key is not None or int(os.environ.get("RANK", "0")) != 0:
            return
        key = self.folder.resolve()
        stream, holders = _held.get(key) or (_open(self.folder), 0)
        _held[key] = stream, holders + 1
        self._key = key

    def release(self) -> None:
        """Let go; nothing happens if the lock was not taken."""
        if self._key is None:
            return
        stream, holders = _held.pop(self._key)
        if holders > 1:
            _held[self._key] = stream, holders - 1
        else:
            stream.close()
        self._key = None

    def __del__(self) -> None:
        self.release()


def _open(folder: Path) -> IO[str]:
    stream = (folder / FILE).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s cannot be locked (%s): see to it that no other process writes there", folder, error)
            return stream
        stream.seek(0)
        owner = stream.read().strip() or "another process"
        stream.close()
        raise InputError(
            f"output_dir: must be used by one process at a time, got {folder}, which {owner} is writing to. Wait for "
            "it to end, or stop it."
        ) from None
    stream.seek(0)
    stream.truncate()
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return stream
