"""The C library's heap, set for a process whose memory counts."""

from __future__ import annotations

import ctypes
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # options of mallopt(3)
PASSES, GRAPH = (2**24, 2**26), (2**20, 2**24)  # bytes from which a tensor has its own pages, free ones go back

_asked = False


def return_freed_memory() -> None:
    """Have the largest tensors' memory go back to the system when they are freed, for the rest of this process.

    glibc takes what a process frees as a hint of what it will ask for: after some tensors of megabytes all such tensors
    share one heap, and what lies between those that stay is lost to larger ones. Tensors above the threshold get pages
    of their own instead, which the system has to clear each time: with one of 1 MiB, which forward passes have no need
    of, a step took a quarter longer (docs/performance.md). What is free at the heap's end goes back from 64 MiB on. The
    commands of zopro call this; a script of your own may. Other C libraries are left as they are.
    """
    global _asked
    _asked = True
    expect_graph(False)


def expect_graph(graph: bool) -> None:
    """Say whether what follows keeps a graph's activations, from here on until this is called again.

    They are of 1 to 16 MiB, and in the heap hundreds of megabytes are lost between them: the threshold is then 1 MiB,
    which takes more time (docs/performance.md). Nothing happens where `return_freed_memory` has not been called.
    """
    library = _glibc() if _asked else None
    if library is not None:
        pages, back = GRAPH if graph else PASSES
        library.mallopt(MMAP_THRESHOLD, pages)
        library.mallopt(TRIM_THRESHOLD, back)


def give_back() -> None:
    """Return to the system, once, what is free in the heap: what a process has used before is not what it needs now."""
    library = _glibc()
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def how_set() -> str:
    """What became of the heap's settings on this system, for the record."""
    if _glibc() is None:
        return "left as it is: no mallopt in this C library"
    return "mallopt" if _asked else "left as it is"


def _glibc() -> Any:
    """The C library, if it has `mallopt`."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: Windows
        return None
    return library if hasattr(library, "mallopt") else None
