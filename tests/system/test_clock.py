"""Methods that say what they do: to a clock where there is one, and to nobody where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import pytest
import torch

from zopro.bench.clock import Watch
from zopro.system.clock import timed


class Work:
    clock: Any = None

    @timed("outer")
    def outer(self, seconds: float, fails: bool = False) -> float:
        """What it says."""
        self.inner(fails)
        return seconds

    @timed("inner")
    def inner(self, fails: bool) -> None:
        if fails:
            raise ValueError


class Names:
    def __init__(self) -> None:
        self.seen: list[str] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.seen.append(name)
        try:
            yield
        finally:
            self.seen.append(f"/{name}")


def test_spans_lie_in_one_another_also_where_one_fails() -> None:
    work = Work()
    assert work.outer(3) == 3  # nobody listens
    work.clock = Names()
    assert work.outer(seconds=2) == 2
    with pytest.raises(ValueError):
        work.outer(1, fails=True)
    assert work.clock.seen == ["outer", "inner", "/inner", "/outer"] * 2
    assert list(signature(Work.outer).parameters) == ["self", "seconds", "fails"] and Work.outer.__doc__


def test_a_watch_counts_every_second_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Watch(torch.device("cpu"))
    for _ in range(2):
        with watch.span("loss"):
            now[0] += 1
            with watch.span("log-probs"):
                now[0] += 10
            now[0] += 2
        with watch.span("log-probs"):
            now[0] += 100
    assert watch.take() == {"loss": 6, "loss/log-probs": 20, "log-probs": 200} and watch.take() == {}
