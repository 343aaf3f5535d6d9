"""Two slopes of one loss along one direction: by differences, and by autograd on a row or two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from zopro.system.random_state import preserve_random_state
from zopro.zo import SPSA, Displacement, Gaussian, Weights, groups
from zopro.zo.directions import there
from zopro.zo.eps import auto_eps
from zopro.zo.evaluation import Closure, Evaluator
from zopro.zo.frozen import Frozen, record
from zopro.zo.perturbation import displaced
from zopro.zo.ranks import losses_of_all

AGREEMENT = 0.1  # of the larger slope; what is wrong by less is no worse than the choice of eps
PARTS = 5  # of two rows, tried in turn: equal rewards have no slope
MEMORY_SHARE = 0.5  # of the free memory that a backward pass over a row or two may take
WHOLE = "the whole batch"
GRAPH_FACTOR = 2.0  # gradients of activations beside the activations


@dataclasses.dataclass(frozen=True)
class Slopes:
    """Slopes of one loss along one direction, and what the differences' may be off by."""

    differences: float
    autograd: float
    error: float

    @property
    def larger(self) -> float:
        return max(abs(self.differences), abs(self.autograd))

    @property
    def clear(self) -> bool:
        return self.larger > 3 * self.error

    @property
    def agree(self) -> bool:
        return abs(self.differences - self.autograd) <= AGREEMENT * self.larger + self.error


def compare(spsa: SPSA, closure: Closure) -> Slopes | None:
    """Slopes along the first direction of the coming step, of the ranks' mean; the random state is left as it is.

    Returns None where no difference can be taken.

    Raises:
        MemoryError: the backward pass would take too much of the free memory.
    """
    parameters = trained(spsa)
    frozen = recorded(closure, parameters)
    _reserve(spsa, frozen.saved_bytes, parameters)
    used = partial(frozen.replay, closure) if frozen.matters else closure
    names = [name for name, tensor, _ in groups.named(spsa.param_groups) if tensor.requires_grad]
    weights = Weights([{"params": parameters, "param_names": names}], spsa.directions, spsa.weights.perturbation)
    unit = Displacement(spsa.seed, 0, spsa.step_count, 1.0)

    def offset(t: float, index: int) -> Tensor:
        return weights.offset(dataclasses.replace(unit, t=t))(index)

    with preserve_random_state():
        derivative = _Derivative(closure, parameters, offset)
        evaluator = Evaluator(weights)

        @torch.no_grad()
        def losses(at: Sequence[Displacement]) -> list[float]:
            return evaluator.results(used, at, float)

        def loss_at(t: float) -> float:
            return losses_of_all(spsa.ranks, losses, [dataclasses.replace(unit, t=t)])[0]

        eps, noise = auto_eps(loss_at, weights.scale(unit))
        if math.isnan(eps):
            return None
        wide, narrow = ((loss_at(t) - loss_at(-t)) / (2 * t) for t in (eps, eps / 3))
        error = 0.0 if math.isnan(noise) else abs(wide - narrow) + 6 * noise / eps
        derivative.eps = eps
        evaluator.results(derivative, [None], float)
    return Slopes(wide, of_all(spsa, derivative.slope), error)


class _Derivative:
    """A closure that runs its backward pass, one parameter's gradient at a time.

    Attributes:
        slope: the gradient's, along the way from one displacement by eps to the other.
    """

    def __init__(self, closure: Closure, parameters: list[Tensor], offset: Callable[[float, int], Tensor]) -> None:
        self.closure, self.parameters, self.offset = closure, parameters, offset
        self.eps, self.slope = math.nan, 0.0

    def __call__(self) -> float:
        hook = Tensor.register_post_accumulate_grad_hook
        handles = [hook(parameter, partial(self._add, index)) for index, parameter in enumerate(self.parameters)]
        kept = [parameter.grad for parameter in self.parameters]
        try:
            for parameter in self.parameters:
                parameter.grad = None
            with torch.enable_grad():
                loss = self.closure()
                if loss.requires_grad:
                    loss.backward(inputs=self.parameters)
            return float(loss.detach())
        finally:
            for handle in handles:
                handle.remove()
            for parameter, grad in zip(self.parameters, kept, strict=True):
                parameter.grad = grad

    @torch.no_grad()
    def _add(self, index: int, parameter: Tensor) -> None:
        ends = (self.offset(t, index) for t in (self.eps, -self.eps))
        plus, minus = (displaced(parameter, end).float() for end in ends)  # as they round in bfloat16
        assert parameter.grad is not None
        (products,) = there.summable(plus.sub_(minus).mul_(parameter.grad))
        self.slope += float(products.sum(dtype=torch.float64)) / (2 * self.eps)
        parameter.grad = None


def recorded(closure: Closure, parameters: list[Tensor]) -> Frozen:
    """A recording under the random state of the evaluations to come, which is left as it is."""
    with preserve_random_state():
        evaluator = Evaluator(Weights([{"params": parameters}], Gaussian(), "in_place"))
        # The tensor is wanted: read as a number it would be one of the numbers that may matter.
        return record(lambda: evaluator.results(closure, [None], lambda loss: loss)[0], parameters)


def trained(spsa: SPSA) -> list[Tensor]:
    return [tensor for _, tensor, _ in groups.named(spsa.param_groups) if tensor.requires_grad]


def of_all(spsa: SPSA, value: float) -> float:
    """The mean over ranks."""
    return value if spsa.ranks is None else spsa.ranks.mean([value])[0]


def _reserve(spsa: SPSA, activations: int, parameters: list[Tensor]) -> None:
    """Raise MemoryError on all ranks if one of them has too little."""
    device = parameters[0].device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available
    largest = max(parameter.numel() for parameter in parameters)
    needed = GRAPH_FACTOR * activations + 4 * 4 * largest  # its gradient, both its displacements, one being made: float32
    if of_all(spsa, float(needed > MEMORY_SHARE * free)):
        raise MemoryError(f"a backward pass over a row or two takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def parts(inputs: Any) -> Iterator[tuple[str, Any]]:
    """Parts of a batch of two rows each, and how they are called: pairs where its halves are chosen and rejected answers.

    Only the whole batch where its tensors do not all have its rows first.
    """
    values = inputs.values() if isinstance(inputs, Mapping) else ()
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim()]
    size = max((len(tensor) for tensor in tensors), default=0)
    half = size // 2
    if size <= 2 or any(len(tensor) not in (size, half) for tensor in tensors):
        yield WHOLE, inputs
        return

    def part(value: Any, row: int) -> Any:
        if isinstance(value, Tensor) and value.dim():
            return value[[row, half + row]] if len(value) == size else value[row : row + 1]
        return [value[row], value[half + row]] if isinstance(value, list) and len(value) == size else value

    for row in sorted({k * half // PARTS for k in range(PARTS)}):
        yield f"2 of {size} rows", {key: part(value, row) for key, value in inputs.items()}
