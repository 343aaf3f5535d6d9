"""CUDA graphs in miniature, on any device: what a step did is written down once and done again on the same tensors.

A replay knows no Python: a number that the host counted, a tensor that was made for one pass, a branch not taken stay
as they were, just as in a graph. So CPU tests show what would go wrong on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zopro.engine.gpu.graphs import Graphs


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = _storages(_tensors(result)) & _storages(_tensors((args, kwargs)))
        if func._schema.is_mutable or not aliases:  # views of what is written anew are seen to by what they view
            self.done.append((func, args, kwargs or {}, None if func._schema.is_mutable else result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.done:
            again = func(*args, **kwargs)
            if result is not None:
                for old, new in zip(_tensors(result), _tensors(again), strict=True):
                    old.copy_(new)


class Taped(Graphs):
    """`Graphs` whose captures are tapes."""

    def _there(self) -> Any:
        return nullcontext()

    def _first(self, step: Callable[[], None]) -> None:
        self._latest = Tape()
        with self._latest:
            step()

    def _capture(self, key: Any, step: Callable[[], None]) -> None:
        self._graphs[key] = self._latest
