"""One event loop for all calls of a process, whatever a call does to it."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

import pytest

from zopro.system.event_loop import result


async def loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_calls_share_a_loop_until_one_holds_it_up() -> None:
    first = result(loop(), 5.0)
    assert result(loop(), 0.0) is first

    async def sleeps() -> None:
        await asyncio.sleep(60)

    async def blocks() -> None:
        mended.wait(60)

    mended = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0.05 seconds"):
        result(blocks(), 0.05)
    second = result(loop(), 5.0)
    assert second is not first
    mended.set()
    with pytest.raises(asyncio.TimeoutError):
        result(asyncio.wait_for(sleeps(), 0.01), 5.0)
    assert result(loop(), 5.0) is second, "one that can be cancelled costs no loop"


def test_a_task_that_ends_the_process_ends_no_loop() -> None:
    async def ends() -> None:
        sys.exit(3)

    async def both() -> None:
        await asyncio.gather(ends(), asyncio.sleep(0))

    before = result(loop(), 5.0)
    with pytest.raises(SystemExit):
        result(both(), 5.0)
    assert result(loop(), 5.0) is before


def test_a_process_that_forked_has_a_loop_of_its_own() -> None:
    before = result(loop(), 5.0)
    child = os.fork()
    if not child:
        try:
            os._exit(result(loop(), 5.0) is before)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
