"""One event loop for the async functions of a process, which runs in a daemon thread from their first call on.

What such a function keeps between calls (a semaphore, a client's connections) belongs to the loop of its first use. TRL's
trainers keep one loop too.

import asyncio
from zopro.system.event_loop import result
result(asyncio.sleep(0.1, "done"), 5.0)
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import wait
from contextlib import suppress
from typing import Any


class _Running:
    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run, args=(self._loop,), daemon=True).start()
            return self._loop

    def leave(self, loop: asyncio.AbstractEventLoop) -> None:
        """The next call gets another one."""
        with self._lock:
            self._loop = None if self._loop is loop else self._loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:  # a task that calls sys.exit ends a loop which others wait for
        with suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


_running = _Running()
os.register_at_fork(after_in_child=_running.forget)  # a process that forked has the loop, and not its thread


def result(coroutine: Coroutine[Any, Any, Any], timeout: float) -> Any:
    """What `coroutine` returns, waited for at most `timeout` seconds; 0 waits for ever. Then it is cancelled.

    One that blocks in place of awaiting cannot be: its loop is left to it, and later calls run in another.

    Raises:
        TimeoutError: no result in time.
        BaseException: whatever it raises.
    """
    loop = _running.get()
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        if not wait([future], timeout or None).done:
            _running.leave(loop)
            raise TimeoutError(f"no answer within {timeout:g} seconds")
        return future.result()
    finally:
        future.cancel()
