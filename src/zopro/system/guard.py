"""Calls of judges and reward functions that users supply: their time bounded, what they return checked.

from zopro.system.guard import checked_reward
reward = checked_reward(lambda completions, **kwargs: [len(text) for text in completions], timeout=60)
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import math
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Set
from typing import Any

import torch

from zopro.errors import InputError
from zopro.system import event_loop

CANCELLED = 1.0  # seconds that an async function may take to end once it is late
_OF_ONE_THREAD = re.compile("(main|same) thread")  # what signal and sqlite3 say of calls in another
LARGEST = 1e18  # reward: the squares of a batch of them are float32 numbers still


class Late(TimeoutError):
    """A call that had not returned in its time; it may still be at work."""


def call(function: Callable[..., Any], timeout: float, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, waited for at most `timeout` seconds; 0 waits for ever, in the calling thread.

    The call runs in a thread of its own, which Python cannot kill: one that is late goes on until it returns by itself
    or the process ends, which it does not hold up.

    Raises:
        Late: no answer in time.
        Exception: whatever the function raises; RuntimeError where it would end the process.
    """
    if not timeout:
        return _without_exit(function, *args, **kwargs)
    outcome: list[tuple[bool, Any]] = []
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()

    def work() -> None:
        torch.set_num_threads(threads)  # both are a thread's own
        torch.set_grad_enabled(grad)
        try:
            outcome.append((True, _without_exit(function, *args, **kwargs)))
        except BaseException as error:  # raised again below, in the calling thread
            outcome.append((False, error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise Late(f"no answer within {timeout:g} seconds")
    good, value = outcome[0]
    if not good:
        raise value
    return value


def _without_exit(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except SystemExit as error:  # the process would end as if all were done
        raise _exit(error) from error


async def _awaited(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except SystemExit as error:  # which would end the thread of a loop that others wait for
        raise _exit(error) from error


def _exit(error: SystemExit) -> RuntimeError:
    return RuntimeError(f"it called sys.exit({error.code!r})")


def reason(error: BaseException, text: str | None = None) -> str:
    """The kind of an error and the first line of its text (or of `text` in its place), cut to 100 characters."""
    first = ((str(error) if text is None else text).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first:.100}" if first else type(error).__name__


def read(answer: Any) -> Any:
    """An iterator's values, for which a generator does its work; what is none comes back as it is.

    A tensor or array of no dimension, which only looks like a list, becomes its number.
    """
    if inspect.iscoroutine(answer):
        answer.close()  # else Python warns of it, below our line
    if isinstance(answer, Iterator):
        return list(answer)
    return answer.item() if getattr(answer, "ndim", None) == 0 else answer


def rewards(answer: Any, count: int, who: str) -> list[float]:
    """What a reward function returned as numbers; None, TRL's "this reward does not apply", becomes NaN.

    Raises:
        InputError: not a sequence of `count` finite numbers or None; the message names the first that is none.
    """
    values = read(answer)
    try:
        values = None if isinstance(values, (str, bytes, Mapping, Set)) else list(values)
    except TypeError:
        values = None
    if values is None:
        raise InputError(f"{who}: must return a list of {count} numbers, got {type(answer).__name__}.")
    if len(values) != count:
        raise InputError(f"{who}: must return one number for each of {count} completions, got {len(values)}.")
    return [math.nan if value is None else _number(value, index, who) for index, value in enumerate(values)]


def _number(value: Any, index: int, who: str) -> float:
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception:  # whatever the conversion of the user's object raises
        number = math.nan
    if not abs(number) <= LARGEST:
        shown = f"{value!r:.60} ({type(value).__name__}) for completion {index}"
        raise InputError(f"{who}: must return finite numbers of at most {LARGEST:g}, or None for no reward, got {shown}.")
    return number


def checked_reward(function: Callable[..., Any], timeout: float = 0.0, then: str = "") -> Callable[..., Any]:
    """A reward function as TRL calls it, plain or async, whose answer is checked by `rewards`.

    A function with the attribute `checked` is taken to check its own answers and comes back as it is.

    Args:
        timeout: seconds for one call, 0 for no limit. An async function is cancelled, if it awaits; of a plain one see
            `call`.
        then: what errors say at their end, after the remedy.

    Raises (when called):
        InputError: the function raises, is late, or returns something else than it must.
    """
    if getattr(function, "checked", False):
        return function
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__name__", type(inner).__name__)
    who = f"reward function {name!r}"

    def failed(error: Exception, count: int) -> InputError:
        late = isinstance(error, (TimeoutError, asyncio.TimeoutError))  # one class from Python 3.11 on
        remedy = "Fix it, or raise reward_timeout." if late else "Fix it."
        if timeout and not is_async(inner) and _OF_ONE_THREAD.search(str(error)):
            remedy = "Set reward_timeout: 0, which calls it in the main thread, without a limit."
        if str(error).startswith(f"{getattr(inner, '__qualname__', '')}() got an unexpected keyword argument"):
            remedy = "Let it take **columns too."
        return InputError(f"{who}: must return {count} numbers, but raised {reason(error)}. {remedy} {then}".rstrip())

    def numbers(answer: Any, count: int) -> list[float]:
        try:
            return rewards(answer, count, who)
        except InputError as error:
            raise InputError(" ".join([str(error), *(["Fix it.", then] if then else [])])) from None

    async def checked_async(**kwargs: Any) -> list[float]:
        count = len(kwargs["completions"])
        try:
            answer = read(await asyncio.wait_for(_awaited(function(**kwargs)), timeout or None))
        except InputError:
            raise
        except Exception as error:
            raise failed(error, count) from error
        return numbers(answer, count)

    def checked(**kwargs: Any) -> list[float]:
        count = len(kwargs["completions"])
        try:
            answer = call(lambda: read(function(**kwargs)), timeout)
        except InputError:
            raise
        except Exception as error:
            raise failed(error, count) from error
        return numbers(answer, count)

    chosen: Callable[..., Any] = checked_async if is_async(inner) else checked
    chosen.__name__ = name
    chosen.checked = True  # type: ignore[attr-defined]
    return chosen


def is_async(function: Any) -> bool:
    """Whether calling it gives something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def waited_for(function: Callable[..., Any], timeout: float) -> Callable[..., Any]:
    """An async function as a plain one, run by the process's own event loop (`event_loop`), as one may be running here.

    After `timeout` seconds (0: never) it is cancelled; one that blocks in place of awaiting is left behind. A function
    that is not async comes back as it is.
    """
    if not is_async(function):
        return function

    def plain(**kwargs: Any) -> Any:
        threads, grad = torch.get_num_threads(), torch.is_grad_enabled()

        async def bounded() -> Any:
            torch.set_num_threads(threads)
            torch.set_grad_enabled(grad)
            return await asyncio.wait_for(_awaited(function(**kwargs)), timeout or None)

        return event_loop.result(bounded(), timeout and timeout + CANCELLED)

    return functools.update_wrapper(plain, function)
