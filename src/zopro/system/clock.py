"""Where seconds go: methods that name what they do, for whoever gives their object a clock; without one nothing is timed.

class Trainer:
    @timed("rollout")
    def generate(self): ...

trainer.clock = Watch()         # any `Clock`; its `span("rollout")` is around every `generate` from now on
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Protocol, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


class Clock(Protocol):
    """What is told of spans; they may lie in one another."""

    def span(self, name: str) -> AbstractContextManager[None]: ...


def timed(name: str) -> Callable[[Method], Method]:
    """A method that runs inside `self.clock.span(name)` where its object has a clock."""

    def decorate(method: Method) -> Method:
        @wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            clock: Clock | None = getattr(self, "clock", None)
            with nullcontext() if clock is None else clock.span(name):
                return method(self, *args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate
