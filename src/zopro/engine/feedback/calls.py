"""What a row of modules was called with in one pass of a backbone, to call each of them again on some of the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Cache

from zopro.engine.feedback.stream import hooked

_CACHE = object()  # stands for the cache among what a module was called with


class Calls:
    """Keeps, while `watching`, the hidden states that each of `modules` reads and what else it is called with.

    Args:
        modules: in the order in which they run.
        dtype: of the hidden states kept; None: their own.

    Attributes:
        inputs: (M, B, T, H) of M modules; empty before a pass.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype | None = None) -> None:
        self.modules = modules
        self.inputs = torch.empty(0)
        self._dtype, self._own = dtype, torch.float32
        self._arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any], bool]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        def keep(index: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                stream = args[0] if args else kwargs["hidden_states"]
                if not self.inputs.numel():  # one tensor for all: small ones would leave the heap in fragments
                    self._own = stream.dtype
                    self.inputs = stream.new_empty(len(self.modules), *stream.shape, dtype=self._dtype or stream.dtype)
                self.inputs[index].copy_(stream)
                named = {name: _without_cache(value) for name, value in kwargs.items() if args or name != "hidden_states"}
                self._arguments[index] = tuple(map(_without_cache, args[1:])), named, not args

            return hook

        with hooked([m.register_forward_pre_hook(keep(i), with_kwargs=True) for i, m in enumerate(self.modules)]):
            yield

    def states(self, index: int, rows: slice) -> Tensor:
        """What a module read, (b, T, H), in the dtype it read."""
        return self.inputs[index, rows].to(self._own)

    def again(self, index: int, states: Tensor, rows: slice, cache: Cache, beside: Calls) -> Tensor:
        """Call a module on `states` (b, T, H), with what it was called with for `rows` and another cache.

        beside: a pass of the same modules with more or fewer rows, if there was one: what is of rows goes with them.
        """
        other = beside if beside.inputs.numel() else self
        batches = self.inputs.shape[1], other.inputs.shape[1]

        def part(value: Any, beside: Any) -> Any:
            if value is _CACHE:
                return cache
            return _rows(value, beside, rows, batches) if isinstance(value, Tensor) else value

        *given, named = self._arguments[index]
        args, kwargs = tree_map(part, tuple(given), other._arguments[index][:2])
        module = self.modules[index]
        found = module(hidden_states=states, **kwargs) if named else module(states, *args, **kwargs)
        return found if isinstance(found, Tensor) else found[0]


def _rows(tensor: Tensor, beside: Any, rows: slice, batches: tuple[int, int]) -> Tensor:
    """Rows of an argument of a pass of `batches[0]` rows, each of which may have several parts (BLOOM: one for a head).

    All of it where its length does not go with the rows, as the pass `beside` it, of `batches[1]` rows, shows (MPT: one
    part for a head).
    """
    batch, other = batches
    parts, rest = divmod(len(tensor), batch) if tensor.dim() > 1 else (0, 0)
    known = other != batch and isinstance(beside, Tensor) and beside.dim() == tensor.dim()
    if rest or not parts or (len(beside) != parts * other if known else parts > 1):
        return tensor
    return tensor[rows] if parts == 1 else tensor.unflatten(0, (batch, parts))[rows].flatten(0, 1)


def _without_cache(value: Any) -> Any:
    return _CACHE if isinstance(value, Cache) else value
