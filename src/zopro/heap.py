"""The C library's heap, set for a process whose memory counts."""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # options of mallopt(3)


def return_freed_memory() -> None:
    """Have the largest tensors' memory go back to the system when they are freed, for the rest of this process.

    glibc takes what a process frees as a hint of what it will ask for: after some tensors of megabytes all such tensors
    share one heap, and what lies between those that stay is lost to larger ones. Tensors above the threshold get pages
    of their own instead, which the system has to clear each time: with one of 1 MiB a step took a quarter longer
    (docs/performance.md). What is free at the heap's end goes back from 64 MiB on. The commands of zopro call this; a
    script of your own may. Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(MMAP_THRESHOLD, 2**24)
        library.mallopt(TRIM_THRESHOLD, 2**26)
