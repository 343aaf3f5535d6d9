"""theta + t z and theta - t z in one pass of the base weights: a batch and its copy, each half reading its own factors.

For low-rank adapters, whose two displaced versions are small: where a pass is bound by reading the base model's weights,
the second side then costs little. Where it is bound by arithmetic there is nothing to gain (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zopro.errors import InputError
from zopro.zo.perturbation import Offset, Perturbation, describes, displaced, tensors_in

REMEDY = "Use evaluation: sequential."


class Together(Perturbation):
    """Entered in turn for theta + t z and for theta - t z, by a closure that gets its network's outputs from `rows`.

    At theta + t z the network runs on a batch and its copy, for which it reads w - t z; at theta - t z the copy's outputs
    are handed out. The closure must ask for the same outputs both times, in the same order.

    Attributes:
        active: whether `rows` is to be asked.

    Raises (at theta + t z):
        InputError: the closure asks for nothing, or a parameter is read otherwise than as the matrix of a linear layer
            over (rows, time, features).
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters)
        self.active = False
        self._mode: _ReadHalves | None = None  # None at theta - t z
        self._copies: list[Tensor] = []
        self._second = False

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Read these; a side that an interruption has left without its other is forgotten."""
        self.parameters, self._copies, self._second = parameters, [], False

    @contextmanager
    def at(self, offset: Offset) -> Iterator[None]:
        second, self._second = self._second, False
        if not second:
            self._mode, self._copies = _ReadHalves(self.parameters, offset), []
        self.active = True
        try:
            yield
        finally:
            self.active, self._mode = False, None
        if not (second or self._copies):
            raise InputError(f"evaluation: together needs a loss of log-probs from zopro's engine alone. {REMEDY}")
        self._second = not second

    def rows(self, forward: Callable[[], Tensor]) -> Tensor:
        """Outputs (B, ...) of the side in evaluation; `forward` gives (2 B, ...), those of a batch and of its copy."""
        if self._mode is None:
            return self._copies.pop(0)
        with self._mode:
            ours, copy = forward().chunk(2)
        self._copies.append(copy)
        return ours


class _ReadHalves(TorchFunctionMode):
    """The first half of the rows meets w + t z, the second w - t z; both are made once."""

    def __init__(self, parameters: Sequence[Tensor], offset: Offset) -> None:
        super().__init__()
        self.parameters, self.offset = parameters, offset
        self.index_of = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._pairs: dict[int, Tensor] = {}

    def _pair(self, index: int) -> Tensor:
        """(2, out, in): w + t z and w - t z."""
        if index not in self._pairs:
            parameter, offset = self.parameters[index], self.offset(index)
            self._pairs[index] = torch.stack([displaced(parameter, side) for side in (offset.clone(), -offset)])
        return self._pairs[index]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [self.index_of[id(value)] for value in tensors_in((args, kwargs)) if id(value) in self.index_of]
        if not read or describes(func):
            return func(*args, **kwargs)
        x = args[0]
        if func is not torch.nn.functional.linear or len(read) > 1 or x is self.parameters[read[0]] or x.dim() != 3:
            raise InputError(
                "evaluation: together needs trained matrices of linear layers over (rows, time, features), such as LoRA "
                f"adapters of attention and MLP layers; one is read by {getattr(func, '__name__', func)}. {REMEDY}"
            )
        halves = x.reshape(2, -1, x.shape[-1])  # (2, rows / 2 * time, in)
        output = torch.bmm(halves, self._pair(read[0]).transpose(1, 2)).view(*x.shape[:-1], -1)
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return output if bias is None else output + bias
