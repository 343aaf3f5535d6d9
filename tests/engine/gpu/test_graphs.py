"""What is done with captures, on a stand-in for CUDA: when a step runs, when it is replayed, what may go wrong."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zopro.engine.gpu import graphs as module
from zopro.engine.gpu.graphs import Graphs

CPU = torch.device("cpu")


class Counting:
    """A step that counts, and a CUDA whose captures run nothing: the count is put back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trouble: Exception | None = None) -> None:
        self.count, self.ran, self.trouble, self.modes = 0, 0, trouble, list[Any]()
        stream = SimpleNamespace(wait_stream=lambda other: None)
        stands_in: dict[str, Callable[..., Any]] = {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda given: nullcontext(),
            "device": lambda given: nullcontext(),
            "graph_pool_handle": lambda: "pool",
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": self.modes.append,
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
            "graph": self.capture,
        }
        for name, function in stands_in.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, function)

    def step(self) -> None:
        self.count, self.ran = self.count + 1, self.ran + 1

    def replay(self) -> None:
        self.count += 1

    def capture(self, graph: Any, **options: Any) -> Any:
        given = self

        class Capture:
            def __enter__(self) -> None:
                self.before = given.count

            def __exit__(self, *error: Any) -> None:
                given.count = self.before
                if given.trouble is not None:
                    raise given.trouble

        return Capture()


def test_a_step_runs_once_is_captured_once_and_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, graphs = Counting(monkeypatch), Graphs(CPU)
    for key, times in (("a", 3), ("a", 2), ("b", 1), ("a", 4), ("b", 1)):
        before = cuda.count
        graphs.run(key, cuda.step, times)
        assert cuda.count == before + times
    assert cuda.ran == 4  # of each of two, one as it is and one captured
    assert cuda.modes == ["warn", 0] * 2 and not graphs.why_not
    graphs.clear()
    graphs.run("a", cuda.step, 2)
    assert cuda.ran == 6


def test_what_is_not_used_for_long_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    cuda, graphs = Counting(monkeypatch), Graphs(CPU)
    for key in "abacab":
        graphs.run(key, cuda.step, 1)
    assert cuda.ran == 2 * len("abcb")  # b went when c came, a had been used since


def test_a_capture_that_fails_leaves_steps_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, graphs = Counting(monkeypatch, RuntimeError("operation not permitted\nwhen stream is capturing")), Graphs(CPU)
    graphs.run("a", cuda.step, 3)
    graphs.run("b", cuda.step, 2)
    assert cuda.count == 5 and graphs.why_not == "operation not permitted"


def test_memory_that_does_not_do_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Counting(monkeypatch, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        Graphs(CPU).run("a", cuda.step, 3)


def test_a_step_that_waits_for_the_host_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, graphs = Counting(monkeypatch), Graphs(CPU)

    def waiting() -> None:
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=1)
        cuda.step()
        if cuda.count > 2:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)

    graphs.run("a", waiting, 2)
    assert not graphs.why_not
    graphs.run("b", waiting, 3)
    assert cuda.count == 5 and graphs.why_not == "it waits for the host"


def test_cuda_graphs_take_what_they_are_given() -> None:
    assert {"pool", "stream", "capture_error_mode"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
