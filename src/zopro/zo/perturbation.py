"""Reading a model at theta + t z without ever leaving theta perturbed.

Adding and subtracting t z does not give back the same bits, so nothing here does. `InPlace` keeps the originals, for
tensors as small as LoRA adapters. `Virtual` never writes to a parameter: while the closure runs, each torch function
that reads a parameter gets w + t z in its place, dropped when the next one is made; only the largest so far stays (tied
embeddings, read at both ends of a model, are made once). Its memory is that one and one layer at a time, its price the
noise drawn again at each use. What `Virtual` cannot reach are reads that go past torch functions: views and casts that
the model made before the step, TorchScript, and kernels that take a raw pointer (these raise). Such models take
`InPlace`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from zopro.zo import fused

Offset = Callable[[int], Tensor]  # index of a parameter -> its displacement t z: fp32, a new tensor at each call


@runtime_checkable
class Offsets(Protocol):
    """An `Offset` that may give those of all parameters at once."""

    def __call__(self, index: int) -> Tensor: ...

    def all(self) -> list[Tensor] | None:
        """New tensors in fp32; None: they are to be asked for one by one."""


PERTURBATIONS = ("auto", "in_place", "virtual")
KEPT_FROM = 2**18  # elements; smaller displaced tensors are not kept for another read
IN_PLACE_LIMIT = 2**26  # elements; above this the copy of the originals would be felt

# Properties that return values, and so must see w + t z; all others (shape, dtype, device, ...) describe the tensor.
_VALUE_PROPERTIES = (
    torch.Tensor.data,
    torch.Tensor.T,
    torch.Tensor.mT,
    torch.Tensor.H,
    torch.Tensor.mH,
    torch.Tensor.real,
)
# Methods that describe a tensor and are called often: drawing noise for them would be waste.
_DESCRIPTIONS = frozenset(
    ("__len__", "dim", "element_size", "is_contiguous", "is_floating_point", "nelement", "numel", "size", "stride")
)


def describes(func: Any) -> bool:
    """Whether a torch function tells about a tensor (shape, dtype, ...) without reading its values."""
    name = getattr(func, "__name__", "")
    return name in _DESCRIPTIONS or (name == "__get__" and getattr(func, "__self__", None) not in _VALUE_PROPERTIES)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among arguments or results: torch's own flattening takes longer than most functions of a step."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in tensors_in(entry)]
    return tensors_in(list(value.values())) if isinstance(value, dict) else []


def displaced(parameter: Tensor, offset: Tensor) -> Tensor:
    """w + offset, summed in fp32 (fp64 for an fp64 parameter), in the dtype of w; uses up `offset`."""
    wide = offset.to(torch.promote_types(parameter.dtype, torch.float32))
    return wide.add_(parameter.detach()).to(parameter.dtype)


class Perturbation(ABC):
    """A way to read displaced parameters; `at(offset)` is entered once for each evaluation of the loss."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters

    @abstractmethod
    @contextmanager
    def at(self, offset: Offset) -> Iterator[None]:
        """Within the context the parameters read as w + offset(index); after it they hold their bits from before."""
        yield


class InPlace(Perturbation):
    """Writes the displaced values, then copies the kept originals back."""

    @contextmanager
    def at(self, offset: Offset) -> Iterator[None]:
        offsets = offset.all() if isinstance(offset, Offsets) else None
        if offsets is not None:
            before = fused.copies(self.parameters)
            try:
                fused.displace(self.parameters, before, offsets)
                del offsets
                yield
            finally:
                _put_back(lambda: fused.put(self.parameters, before))
            return
        originals = [p.detach().clone() for p in self.parameters]
        try:
            for index, parameter in enumerate(self.parameters):
                parameter.detach().copy_(displaced(originals[index], offset(index)))
            yield
        finally:
            _put_back(lambda: _copy(self.parameters, originals))


def _copy(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.detach().copy_(value)


def _put_back(put: Callable[[], None]) -> None:
    """Call it; if Ctrl-C comes in the middle of it, once more before that goes on."""
    try:
        put()
    except BaseException:
        put()
        raise


class Virtual(Perturbation):
    """Displaces parameters where they are read. Tied weights are one parameter and so share their noise."""

    @contextmanager
    def at(self, offset: Offset) -> Iterator[None]:
        index_of = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        with uncompiled(), _ReadDisplaced(index_of, offset):
            yield


def uncompiled() -> AbstractContextManager[Any]:
    """Where what was compiled runs as it was written: compilers would compile what looks on too, or refuse it."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _ReadDisplaced(TorchFunctionMode):
    def __init__(self, index_of: dict[int, int], offset: Offset) -> None:
        super().__init__()
        self.index_of = index_of
        self.offset = offset
        self._largest: tuple[int, Tensor] | None = None  # kept, for tied weights are read at both ends of a model
        self._last: tuple[int, Tensor] | None = None

    def _displace(self, tensor: Tensor) -> Tensor:
        index = self.index_of.get(id(tensor))
        if index is None:
            return tensor
        for kept in (self._largest, self._last):
            if kept is not None and kept[0] == index:
                return kept[1]
        if tensor.numel() < KEPT_FROM:
            return displaced(tensor, self.offset(index))
        self._last = None  # before the next is made: one perturbed layer is held at once, beside the largest
        if self._largest is not None and tensor.numel() < self._largest[1].numel():
            self._last = made = index, displaced(tensor, self.offset(index))
        else:
            self._largest = None
            self._largest = made = index, displaced(tensor, self.offset(index))
        return made[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if describes(func):
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "data_ptr" and id(args[0]) in self.index_of:
            raise RuntimeError(
                "perturbation: 'virtual' cannot displace a parameter that the model reads by its raw pointer "
                "(data_ptr); use perturbation='in_place'"
            )
        args, kwargs = tree_map_only(torch.Tensor, self._displace, (args, kwargs))
        return func(*args, **kwargs)


def choose(kind: str, parameters: Sequence[Tensor]) -> Perturbation:
    """The perturbation of that name in `PERTURBATIONS`; "auto" is in place for up to `IN_PLACE_LIMIT` elements."""
    small = sum(parameter.numel() for parameter in parameters) <= IN_PLACE_LIMIT
    return InPlace(parameters) if kind == "in_place" or (kind == "auto" and small) else Virtual(parameters)
