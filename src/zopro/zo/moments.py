"""Adam's moments of a zeroth-order step, and the anchor that it is pulled back to: from records alone, in their order.

The estimate u = sum_q g_q z_q of a step is a function of its record, and so are running means of it:

    m <- b1 m + (1 - b1) u;   s <- b2 s + (1 - b2) u^2;   theta <- theta - lr m^ / (sqrt(s^) + 1e-8)

with m^ = m / (1 - b1^n) and s^ = s / (1 - b2^n) (Kingma and Ba 2015); without b2 the step is m^ itself, without b1
there is no mean to take. So a journal needs no tensor for them: whoever applies its records from the first has the same
bits. They cost one tensor each beside the parameters, the anchor one more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zopro.zo.records import StepRecord

ROUNDING = 1e-8  # beside the root of the mean square, as Adam has it


class Moments:
    """Running means of the estimate and of its square, and where the series of records began, by names of tensors."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.mean: dict[str, Tensor] = {}
        self.square: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}
        self.mean_weight: dict[str, float] = {}  # 1 - b^n of the n steps that moved a tensor, also where b changes
        self.square_weight: dict[str, float] = {}

    def begin(self, record: StepRecord) -> None:
        """Before a record is applied: step 0 begins a series."""
        if record.step == 0:
            self.forget()

    def anchored_(self, name: str, tensor: Tensor, wide: Tensor, share: float) -> None:
        """theta <- theta - share (theta - theta_0), in place of `wide`, which has the values of `tensor`."""
        if share and name in self.start:
            wide.lerp_(self.start[name].to(wide), share)
        elif share:
            self.start[name] = tensor.detach().clone()

    def smoothed(self, name: str, estimate: Tensor, record: StepRecord) -> Tensor:
        """What the step is along in place of `estimate`, which is used up."""
        if record.second_moment:
            square = _running(self.square, name, estimate)
            self.square_weight[name] = _weight(self.square_weight, name, record.second_moment)
            square.mul_(record.second_moment).addcmul_(estimate, estimate, value=1 - record.second_moment)
        if record.momentum:
            mean = _running(self.mean, name, estimate)
            self.mean_weight[name] = _weight(self.mean_weight, name, record.momentum)
            mean.mul_(record.momentum).add_(estimate, alpha=1 - record.momentum)
            estimate.copy_(mean).div_(self.mean_weight[name])
        if record.second_moment:
            estimate.div_(square.div(self.square_weight[name]).sqrt_().add_(ROUNDING))
        return estimate

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    def load(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            one = not isinstance(value, dict)  # 0.1.0 has a weight for all
            vars(self)[name] = dict.fromkeys(state[name.removesuffix("_weight")], value) if one else dict(value)


def _weight(table: dict[str, float], name: str, beta: float) -> float:
    return beta * table.get(name, 0.0) + 1 - beta


def _running(table: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A running mean, 0 at first, where `like` is: transformers loads a state to the CPU."""
    table[name] = table[name].to(like.device) if name in table else torch.zeros_like(like)
    return table[name]
