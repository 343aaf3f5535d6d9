"""One process on one run directory: a second one is refused, and the lock of a crashed one does not block.

The lock is the system's (`filelock`, on RUN/.lock), so it ends with its process however that ends; RUN/.lock.owner only
says who it is. Within one process a directory can be locked again: the lock goes when the last holder lets go.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
from pathlib import Path

from filelock import FileLock, Timeout

from zopro.errors import InputError
from zopro.store.layout import Layout
from zopro.system import ranks

logger = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # of file systems that have none


class RunLock:
    """The right to write to one run directory.

    Ranks of one job share it: only the first takes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: FileLock | None = None

    def acquire(self) -> None:
        """Take the lock; taking it twice is taking it once. Raises InputError: another process has it."""
        if self._lock is not None or not ranks.first():
            return
        lock = FileLock(str(Layout(self.folder.resolve()).lock()), timeout=0, thread_local=False, is_singleton=True)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"output_dir: must be used by one process at a time, got {self.folder}, which {_owner(self.folder)} is "
                "writing to. Wait for it to end, or stop it."
            ) from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            logger.warning("%s cannot be locked (%s): make sure that no other process writes there", self.folder, error)
            return
        self._lock = lock
        Layout(self.folder).owner().write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")

    def release(self) -> None:
        """Let go; nothing happens if the lock was not taken."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __del__(self) -> None:
        self.release()


def _owner(folder: Path) -> str:
    path = Layout(folder).owner()
    return (path.read_text(encoding="utf-8").strip() if path.exists() else "") or "another process"
