"""What is done with captures, on a stand-in for CUDA: when a step runs, when it is replayed, what may go wrong."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zopro.engine.gpu import graphs as module
from zopro.engine.gpu.decoding import is_scarce
from zopro.engine.gpu.graphs import Graphs

CPU = torch.device("cpu")


class Counting:
    """A step that counts, and a CUDA whose captures run nothing: the count is put back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trouble: Exception | None = None) -> None:
        self.count, self.ran, self.trouble, self.modes = 0, 0, trouble, list[Any]()
        stream = self.current = SimpleNamespace(wait_stream=lambda other: None)
        stands_in: dict[str, Callable[..., Any]] = {
            "Stream": lambda: SimpleNamespace(wait_stream=stream.wait_stream),
            "current_stream": lambda: self.current,
            "stream": self.on,
            "device": lambda given: nullcontext(),
            "graph_pool_handle": lambda: "pool",
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": self.modes.append,
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
            "current_device": lambda: 0,
            "graph": self.capture,
        }
        for name, function in stands_in.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, function)
        self.ended: list[Any] = []
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: self.ended.append(given), raising=False)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def step(self) -> None:
        self.count, self.ran = self.count + 1, self.ran + 1

    def replay(self) -> None:
        self.count += 1

    def capture(self, graph: Any, **options: Any) -> Any:
        given = self

        class Capture:
            def __enter__(self) -> None:
                self.before, self.stream = given.count, given.current
                given.current = options["stream"]

            def __exit__(self, *error: Any) -> None:  # torch's, too, puts the stream back only where all went well
                given.count = self.before
                if given.trouble is not None:
                    raise given.trouble
                given.current = self.stream

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
    assert cuda.ended == [(0, "pool")], "else no cache can be emptied any more"


def test_the_stream_and_the_reason_survive_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all that follows would run on the stream of the capture, and the line would tell of its end alone."""
    cuda = Counting(monkeypatch, RuntimeError("operation failed due to a previous error during capture"))
    graphs, outside = Graphs(CPU), cuda.current

    def step() -> None:
        cuda.step()
        if cuda.ran == 2:
            raise RuntimeError("this kernel allocates")

    graphs.run("a", step, 3)
    assert cuda.current is outside and graphs.why_not == "this kernel allocates"
    assert cuda.count == 3 and cuda.ran == 4  # one of them was to be captured


def test_a_capture_in_inference_mode_serves_outside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch makes tensors of its own for a graph, and up to 2.10 writes to them at each replay (pytorch issue 166792)."""
    cuda, made = Counting(monkeypatch), list[torch.Tensor]()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: made[0].fill_(1)))
    graph = torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kw: made.append(torch.empty(1)) or graph(*args, **kw))
    graphs = Graphs(CPU)
    with torch.inference_mode():
        graphs.run("a", cuda.step, 2)
    graphs.run("a", cuda.step, 1)
    assert made[0] == 1 and not made[0].requires_grad


@pytest.mark.cuda
def test_after_a_failed_capture_the_device_goes_on() -> None:
    numbers, graphs = torch.ones(3, device="cuda"), Graphs(torch.device("cuda"))

    def step() -> None:
        numbers.add_(1)
        if torch.cuda.is_current_stream_capturing():
            numbers.sum().item()

    torch.cuda.manual_seed(0)
    graphs.run("a", step, 4)
    assert graphs.why_not and numbers.tolist() == [5, 5, 5]
    drawn = torch.rand(2, device="cuda")
    assert torch.nn.functional.dropout(numbers, 0.5).shape == (3,)
    torch.cuda.empty_cache()
    torch.cuda.manual_seed(0)
    assert torch.equal(drawn, torch.rand(2, device="cuda"))


def test_memory_that_ends_in_a_capture_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Counting(monkeypatch, RuntimeError("operation failed due to a previous error during capture"))

    def step() -> None:
        cuda.step()
        if cuda.ran == 2:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        Graphs(CPU).run("a", step, 3)


@pytest.mark.parametrize(
    ("weights_gb", "free_gb", "scarce"), [(16, 6, False), (16, 3, True), (1, 20, False), (1, 6, True)]
)
def test_memory_beside_the_weights_decides_whether_more_is_held(
    weights_gb: int, free_gb: int, scarce: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An 8B model takes two thirds of a card of 24 GB; it would never be decoded by a graph that is kept."""
    gigabyte = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gb * gigabyte, 24 * gigabyte))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    model = torch.nn.Linear(weights_gb * gigabyte // 8, 4, bias=False, device="meta", dtype=torch.bfloat16)
    assert is_scarce(torch.device("cuda"), model) == scarce


def test_memory_that_does_not_do_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Counting(monkeypatch, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        Graphs(CPU).run("a", cuda.step, 3)


@pytest.mark.parametrize("always", [True, False])
def test_a_step_that_waits_for_the_host_is_not_captured(always: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what only the first of its kind does."""
    cuda, graphs = Counting(monkeypatch), Graphs(CPU)

    def waiting() -> None:
        cuda.step()
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=1)
        if always or cuda.count == 1:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graphs.run("a", waiting, 1)
        assert not graphs.why_not and cuda.ran == 1
        graphs.run("a", waiting, 4)
    assert cuda.count == 5 and graphs.why_not == ("it waits for the host" if always else "")
    assert cuda.ran == (5 if always else 3)


def test_cuda_graphs_take_what_they_are_given() -> None:
    assert {"pool", "stream", "capture_error_mode"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
