"""What a loss makes of its parameters: every torch function is watched, storage by storage.

Views and results written in place are followed, and each `autograd.Function` is one function: its own code runs without a
graph and may call kernels that nothing sees. Where ranks exchange tensors, what comes back is followed as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from zopro.zo.perturbation import describes, tensors_in

_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
_NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")
_SHAPED = frozenset((*_LIKE, *_NEW))  # results have the shape or dtype of the first argument and none of its values
_SHAPED_LIKE_SECOND = frozenset(("expand_as", "reshape_as", "type_as", "view_as"))


class Trace(TorchFunctionMode, ABC):
    """Watches one evaluation of a loss; `follow` is asked for every function of what comes from the parameters.

    Attributes:
        place: of the function in hand among these. Others are not counted: they may be cached from a call before.
        inside: whether a function is running, whose own calls are no functions of the loss.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.parameters = parameters
        self.place = 0
        self.inside = False
        self._dependent: dict[int, StorageWeakRef] = {}  # a weak reference keeps the storage's number from another's use
        self.mark(*parameters)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context. Tensors that a graph would keep for its backward pass go to `saved` and are not kept."""
        hooks = torch.autograd.graph.saved_tensors_hooks(self.saved, _unpack)
        with hooks, _functions_of(self), _collectives(self), self:
            yield

    def saved(self, tensor: Tensor) -> None:
        """Of a tensor that a backward pass would need."""

    def mark(self, *tensors: Tensor) -> None:
        """What is in the tensors' memory comes from the parameters from now on."""
        with torch._C.DisableTorchFunction():
            for storage in map(storage_of, tensors):
                if storage is not None and storage._cdata not in self._dependent:
                    self._dependent[storage._cdata] = StorageWeakRef(storage)

    def dependent(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those of the tensors that come from the parameters."""
        with torch._C.DisableTorchFunction():
            storages = ((tensor, storage_of(tensor)) for tensor in tensors)
            return [tensor for tensor, storage in storages if storage is not None and storage._cdata in self._dependent]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside or describes(func) or self._sets_requires_grad(func, args):
            return func(*args, **kwargs)
        return self.call(func, getattr(func, "__name__", repr(func)), args, kwargs)

    def _sets_requires_grad(self, func: Any, args: Any) -> bool:
        """Of a parameter, as PEFT does when it switches adapters; of another tensor it would be where a graph begins."""
        return func is Tensor.requires_grad_ and any(args[0] is parameter for parameter in self.parameters)

    def call(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        """What `func` returns, followed if it is a function of what comes from the parameters."""
        read = (args[1:], kwargs) if name in _SHAPED else args[:1] if name in _SHAPED_LIKE_SECOND else (args, kwargs)
        dependent = self.dependent(tensors_in(read))
        if not dependent:
            return func(*args, **kwargs)
        self.place += 1
        self.inside = True
        try:
            result = self.follow(func, name, args, kwargs, dependent)
        finally:
            self.inside = False
        self.mark(*tensors_in(args[:1] if result is None else result))
        return result

    @abstractmethod
    def follow(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, dependent: list[Tensor]) -> Any:
        """What `func` is to return; some of its tensors depend on the parameters."""


class _Collectives(TorchDispatchMode):
    """What ranks gather comes from the parameters if what they give does; no torch function tells."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = tensors_in((args, kwargs, result))
            if self.trace.dependent(tensors):
                self.trace.mark(*tensors)
        return result


@contextmanager
def _collectives(trace: Trace) -> Iterator[None]:
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    with _Collectives(trace):
        yield


@contextmanager
def _functions_of(trace: Trace) -> Iterator[None]:
    """Each `autograd.Function` as one function: their own code runs without a graph and may call kernels unseen."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        plain = partial(original.__func__, cls)
        return plain(*args, **kwargs) if trace.inside else trace.call(plain, cls.__name__, args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def _unpack(_: Any) -> Tensor:
    raise RuntimeError("the loss runs a backward pass of its own")


def storage_of(tensor: Tensor) -> Any:
    """Its storage, or None. Called with torch functions disabled, for a mode below would hand out another one."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # within torch.vmap
            return storage_of(torch._C._functorch.get_unwrapped(tensor))
        return None  # sparse tensors have none
