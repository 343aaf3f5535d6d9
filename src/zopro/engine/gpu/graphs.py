"""Captured steps: which may be replayed when, and the only place that uses CUDA graphs.

A graph holds addresses and the choices that were made on the host. Adapters that change in place (a displacement, an
update) are read anew at each replay; what else a pass depends on is in its `signature`, so that another adapter, or
the same one disabled, has a graph of its own. `only_now` says when nothing may be captured, because what the model reads
is made for this one pass.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

LIBRARIES = ("transformers.", "peft.", "trl.")  # whose hooks record outputs, or let gradients reach the embeddings
KEPT = 96  # graphs; a few MB each beside the memory they share

Step = Callable[[], object]


def only_now() -> str:
    """Why nothing can be captured at the moment; empty where it can."""
    if any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()):
        return "it reads tensors that are made for one pass (a virtual displacement, or both sides together)"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode looks on"
    return "autocast casts its weights anew" if torch.is_autocast_enabled("cuda") else ""


def watched(model: nn.Module) -> str:
    """The module whose hooks a replay would not call; empty where there is none. Those of LIBRARIES do nothing here."""
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not (getattr(hook, "__module__", None) or "").startswith(LIBRARIES):
                return name or type(module).__name__
    return ""


def signature(model: nn.Module) -> Hashable:
    """What a graph of this model holds for good: the tensors' addresses and the adapters in use."""
    with torch._C.DisableTorchFunction():  # which looks at parameters that are read
        tensors = [(one.data_ptr(), one.shape, one.dtype) for one in (*model.parameters(), *model.buffers())]
    return hash((*tensors, *(_use(module) for module in model.modules() if isinstance(module, BaseTunerLayer))))


def _use(layer: Any) -> Hashable:
    scaling = getattr(layer, "scaling", {})
    return tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters), tuple(scaling.items())


class Graphs:
    """Steps by what they were captured for, in one pool of memory: no two run at once, and none leaves anything in it.

    Args:
        device: where the steps run.

    Attributes:
        why_not: what went wrong when one was captured; none is from then on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: OrderedDict[Hashable, Any] = OrderedDict()
        self._pool: Any = None
        self._stream: Any = None
        self._waited: set[Hashable] = set()
        self.why_not = ""

    def clear(self) -> None:
        """Before memory that they read goes."""
        self._graphs.clear()
        self._pool = None

    def run(self, key: Hashable, step: Step, times: int) -> None:
        """Take a step some times, at least once. The first of its kind runs as it is, which also warms up."""
        with self._there():
            while times and key not in self._graphs and not self.why_not:
                self._first(key, step)
                times -= 1
            graph = self._graphs.get(key)
            for _ in range(times):
                step() if graph is None else graph.replay()
        if key in self._graphs:
            self._graphs.move_to_end(key)

    def _there(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device)

    def _first(self, key: Hashable, step: Step) -> None:
        """A step as it is, then a capture; if it waited, which the first of its kind may, another has to come before."""
        if not self._waits(step):
            self._capture(key, step)
        elif key in self._waited:
            self.why_not = "it waits for the host"
        else:
            self._waited.add(key)

    def _waits(self, step: Step) -> bool:
        """Take a step; whether the host had to wait for it."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        before = torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(torch.cuda.current_stream())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(self._stream):
                    step()
            finally:
                torch.cuda.set_sync_debug_mode(before)
                torch.cuda.current_stream().wait_stream(self._stream)
        return any("called a synchronizing" in str(entry.message) for entry in caught)

    def _capture(self, key: Hashable, step: Step) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.stream(torch.cuda.current_stream())
        kept = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        plain = torch.inference_mode(False)  # what a graph keeps for itself is written outside of that mode as well
        try:  # `here`: a capture that fails stays on its own stream
            with plain, torch.no_grad(), here, torch.cuda.graph(graph, **kept):
                step()
        except torch.OutOfMemoryError:
            self._end()
            raise
        except RuntimeError as error:
            self._end()
            cause = _first(error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            self.why_not = next(iter(str(cause).splitlines()), type(error).__name__)
            with suppress(RuntimeError):
                self.clear()
            for generator in torch.cuda.default_generators:  # may think that they are still captured, and refuse to draw
                generator.graphsafe_set_state(generator.clone_state())
            return
        self._graphs[key] = graph
        while len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)

    def _end(self) -> None:
        """Some releases of torch do not, where a capture fails, and refuse to empty their cache ever after."""
        with suppress(RuntimeError, AttributeError):  # others have done so
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)


def _first(error: RuntimeError) -> RuntimeError:
    """What went wrong in the step, of which the end of the capture says no more than that something did."""
    before = error.__context__
    return before if isinstance(before, RuntimeError) else error


class Uncaptured(Graphs):
    """Runs every step as it is: on other devices, and in tests."""

    def run(self, key: Hashable, step: Step, times: int) -> None:
        for _ in range(times):
            step()
