"""Which tensors a loss depends on, as far as that can be seen while a closure runs.

Every torch function is watched: what it returns depends on what it was given, storage by storage, so that views and
writes in place are covered. A product with a plain 0 depends on nothing. Reads that go past torch functions (TorchScript,
kernels by raw pointer, other threads) are not seen; `zopro.zo.unread` asks the loss itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zopro.zo.perturbation import describes, tensors_in, uncompiled

_PRODUCTS = frozenset(("mul", "multiply", "__mul__", "__rmul__"))


class Reads(TorchFunctionMode):
    """Watches evaluations of a loss.

    Attributes:
        tensors: what is watched for.
        touched: those that a torch function was given, as bits: 1 << index.
        used: those that the loss depends on.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self.touched = self.used = 0
        self._own: dict[int, int] = {}  # storage -> the tensors in it
        for index, tensor in enumerate(tensors):
            self._own[_storage(tensor)] = self._own.get(_storage(tensor), 0) | 1 << index
        self._depends: dict[int, int] = {}  # storage -> the tensors that its values depend on

    def watch(self, closure: Callable[[], Any]) -> Any:
        """What `closure` returns; it is not watched once all tensors are known to be used."""
        if self.used == (1 << len(self.tensors)) - 1:
            with uncompiled():
                return closure()
        self._depends = dict(self._own)
        with uncompiled(), self:
            value = closure()
        if isinstance(value, Tensor):
            self.used |= self._depends.get(_storage(value), 0)
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if describes(func):
            return result
        given = {_storage(value) for value in tensors_in((args, kwargs))}
        made = {_storage(value) for value in tensors_in(result)}
        mask = 0
        for key in given:
            mask |= self._depends.get(key, 0)
            self.touched |= self._own.get(key, 0)
        if getattr(func, "__name__", "") in _PRODUCTS:
            factors = (*args, *kwargs.values())
            mask = 0 if any(type(x) in (int, float) and x == 0 for x in factors) else mask
        if result is None:  # it wrote to what it was given
            made = given
        elif not made:  # a number, of which nothing more is seen
            self.used |= mask
        for key in made:  # a storage that was not given is new, whatever was at its address before
            self._depends[key] = mask | (self._depends.get(key, 0) if key in given else self._own.get(key, 0))
        return result


def _storage(tensor: Tensor) -> int:
    """What identifies the memory of a tensor while it lives."""
    with torch._C.DisableTorchFunction():
        try:
            return int(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # sparse, or a wrapper around others
            return id(tensor)
