"""What an error says to the person who gave the command: an exit code and one line, or nothing where it is our bug.

Input is checked before work begins, and what a library raises on it is renamed where it is called. This is the last
resort: what can happen anywhere, to anyone, in any library.
"""

from __future__ import annotations

import errno

from zopro.errors import Diverged, InputError, Stopped, one_line, out_of_memory
from zopro.store.durable import disk_full

_FILES = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.EIO, errno.EBUSY, errno.ESTALE),
)
"""What the system says about files that were named, removed or protected by somebody; other errors are ours."""


def explained(error: BaseException) -> tuple[int, str] | None:
    """Exit code and line of a known error: 2 for bad input, 1 for a machine that gives out; None for any other.

    >>> explained(FileNotFoundError(2, "No such file or directory", "runs/a/config.yaml"))
    (2, "error: 'runs/a/config.yaml': No such file or directory.")
    >>> explained(KeyError("x")) is None
    True
    """
    if isinstance(error, (Diverged, FloatingPointError)):
        return 2, f"error: learning rate: must be low enough to train with: {one_line(error)}."
    if isinstance(error, InputError):
        return 2, f"error: {one_line(error)}"
    if isinstance(error, Stopped):
        return 1, f"stopped: {one_line(error)}"
    if cause := disk_full(error):
        reason = "the disk is full, or a quota or size limit is reached"
        return 1, f"stopped: {reason} ({one_line(cause)}). Free space, and run it again."
    if cause := out_of_memory(error):
        return 1, (
            f"stopped: the memory is full ({one_line(cause):.200}). Lower what goes through the model at once "
            "(prompts_per_step, num_generations, the batch sizes, the lengths), or take a smaller model."
        )
    if isinstance(error, OSError) and error.errno in _FILES and error.filename is not None:
        return 2, f"error: {str(error.filename)!r}: {error.strerror}."
    return None
