"""What a gradient takes as constant, kept at theta while the loss is evaluated around it.

A gradient does not see through `detach`, `no_grad`, comparisons, indices or numbers read into Python; a difference of
losses does. So the slope of f(theta, c(theta)), where c is such a factor, is another one by differences than by autograd.
`record` evaluates the closure once at theta and finds each c as autograd itself does: a value that comes from the
parameters, needs no gradient, and enters an operation whose result does. `Frozen.replay` then evaluates the closure
elsewhere with the same c.

    frozen = record(closure, parameters)
    if frozen.matters:
        closure = partial(frozen.replay, closure)

The recording keeps the graph but none of its saved tensors, so its memory is that of a forward pass and of the factors.
It sees torch functions and `autograd.Function`s. It does not see what one such function hides in itself (the `hard`
samples of `gumbel_softmax`, a backward of one's own), which has no frozen value to take: zopro.train.slope compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from zopro.zo.dependence import Trace, storage_of
from zopro.zo.evaluation import Closure

_NUMBERS = ("item", "tolist", "numpy", "__array__", "__int__", "__float__", "__index__", "__complex__")
_READS = frozenset((*_NUMBERS, "__bool__", "is_nonzero", "equal", "allclose"))  # into Python, where no graph follows
_NUDGE = 1.1  # of the numbers read


class OtherPath(RuntimeError):
    """The closure takes another path through its code elsewhere than at theta."""


@dataclass
class _Event:
    """What one function of the recording got or gave that is to be the same elsewhere."""

    name: str
    arguments: dict[int, Tensor] = field(default_factory=dict)  # place among the flattened arguments -> value
    results: dict[int, Tensor] = field(default_factory=dict)  # place among the flattened results -> value
    read: Any = None  # values read into Python


@dataclass
class Frozen:
    """A recording at theta.

    Attributes:
        loss: the closure's value.
        matters: whether the loss holds a factor that its gradient takes as constant.
        saved_bytes: memory that a backward pass would have kept for activations.
    """

    parameters: Sequence[Tensor]
    loss: float = math.nan
    matters: bool = False
    saved_bytes: int = 0
    events: dict[int, _Event] = field(default_factory=dict)

    def replay(self, closure: Closure, nudge: float = 1.0) -> float:
        """The closure's value with the factors of the recording.

        Args:
            nudge: multiplies the numbers read into Python.

        Raises:
            OtherPath: the closure calls other functions than it did at theta.
        """
        replay = _Replay(self, nudge)
        loss = _run(replay, closure)
        if self.events and replay.place < max(self.events):
            raise OtherPath("it calls fewer functions than at theta")
        return loss


def record(closure: Closure, parameters: Sequence[Tensor]) -> Frozen:
    """Evaluate the closure, and once more if numbers were read into Python: whether they matter cannot be seen.

    The caller keeps the random state the same for both. Raises what the closure raises.
    """
    frozen = Frozen(parameters)
    frozen.loss = _run(_Record(frozen), closure)
    read = (event.read for event in frozen.events.values())
    if not frozen.matters and math.isfinite(frozen.loss) and any(_nudged(value, _NUDGE) is not value for value in read):
        try:
            frozen.matters = not math.isclose(frozen.replay(closure, _NUDGE), frozen.loss, rel_tol=1e-6)
        except Exception:  # whatever a wrong number leads to: it matters
            frozen.matters = True
    return frozen


def _run(trace: Trace, closure: Closure) -> float:
    with torch.enable_grad(), trace.watching():  # with a graph also elsewhere, for code that asks whether there is one
        loss = closure()
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


class _Record(Trace):
    def __init__(self, frozen: Frozen) -> None:
        super().__init__(frozen.parameters)
        self.frozen = frozen
        self._saved: dict[int, StorageWeakRef] = dict(self._dependent)  # parameters are there anyhow

    def saved(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            storage = storage_of(tensor)
            if storage is not None and storage._cdata not in self._saved and not tensor.is_leaf:
                self._saved[storage._cdata] = StorageWeakRef(storage)
                self.frozen.saved_bytes += storage.nbytes()

    def follow(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, dependent: list[Tensor]) -> Any:
        constants = {id(tensor) for tensor in dependent if not tensor.requires_grad}
        if not constants and name not in _READS:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and _real(result):  # as most are
                return result
        leaves = tree_leaves((args, kwargs))
        values = {place: leaf for place, leaf in enumerate(leaves) if id(leaf) in constants and _real(leaf)}
        if constants or name in _READS:
            if _writes(name):  # these may be other ones afterwards
                values = {place: leaf.detach().clone() for place, leaf in values.items()}
            result = func(*args, **kwargs)
        event = _Event(name)
        outcomes = tree_leaves(leaves[0] if result is None else result)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in outcomes):
            self.frozen.matters |= bool(constants)
            event.arguments = {place: leaf.detach().clone() for place, leaf in values.items()}
        if any(_real(tensor) for tensor in dependent):  # whole numbers made of these stay as they are
            whole = {place: leaf for place, leaf in enumerate(outcomes) if isinstance(leaf, Tensor) and not _real(leaf)}
            event.results = {place: leaf.clone() for place, leaf in whole.items()}
        if name in _READS:
            event.read = _copy(result)
        if event.arguments or event.results or name in _READS:
            self.frozen.events[self.place] = event
        return result


class _Replay(Trace):
    def __init__(self, frozen: Frozen, nudge: float) -> None:
        super().__init__(frozen.parameters)
        self.frozen = frozen
        self.nudge = nudge

    def follow(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, dependent: list[Tensor]) -> Any:
        event = self.frozen.events.get(self.place)
        if event is None:
            return func(*args, **kwargs)
        if event.name != name:
            raise OtherPath(f"it calls {name} where it called {event.name} at theta")
        leaves, spec = tree_flatten((args, kwargs))
        for place, value in event.arguments.items():
            if not isinstance(leaves[place], Tensor) or leaves[place].shape != value.shape:
                raise OtherPath(f"{name} gets values of another shape than at theta")
            if place == 0 and _writes(name):
                leaves[0].detach().copy_(value)
            else:
                leaves[place] = value
        args, kwargs = tree_unflatten(leaves, spec)
        result = func(*args, **kwargs)
        if name in _READS:
            return _copy(event.read) if self.nudge == 1 else _nudged(event.read, self.nudge)
        if not event.results:
            return result
        if _writes(name):
            leaves[0].copy_(event.results[0])
            return result
        outcomes, shape = tree_flatten(result)
        for place, value in event.results.items():
            outcomes[place] = value.clone()
        return tree_unflatten(outcomes, shape)


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _writes(name: str) -> bool:
    """Whether a function writes to its first argument."""
    in_place = name.endswith("_") and not name.endswith("__")
    augmented = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return in_place or augmented or name == "__setitem__"


def _copy(value: Any) -> Any:
    """Of what was read: a list or an array is the reader's to change."""
    return value.copy() if hasattr(value, "copy") else value


def _nudged(value: Any, factor: float) -> Any:
    """Other numbers of the same kind; the value itself where it is a truth value, or nothing."""
    if isinstance(value, list):
        found = [_nudged(entry, factor) for entry in value]
        return value if all(a is b for a, b in zip(found, value, strict=True)) else found
    if hasattr(value, "dtype"):
        return (value * factor).astype(value.dtype) if value.dtype.kind in "fc" else value
    if value is None or isinstance(value, bool):
        return value
    return value + 1 if isinstance(value, int) else value * factor
