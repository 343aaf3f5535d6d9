"""Importing the libraries, which takes seconds, without looking for garbage among what they make."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from zopro.system.progress import task


@contextmanager
def importing() -> Iterator[None]:
    """Pause garbage collection while imports go on inside, and spare what they have made the collections after.

    A quarter of the time goes into looking through 740 000 objects that all stay (docs/performance.md); what a trainer
    asks for at its end would go through them again.
    """
    before, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        with task("importing the libraries", once=True):
            yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if enabled:
            gc.enable()
