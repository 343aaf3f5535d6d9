"""How far a zeroth-order step moves the policy: its KL, of log-probs that the step has asked for anyway.

To second order the KL of pi(theta + delta) to pi(theta) is half the mean square, over the policy's own answers y, of what
delta changes log pi(y) by: of a step along z_q by lr c_q each, the sum of lr c_q times the slope of log pi(y) along z_q.
The two sides of a query give that slope, and the sum holds however much the z_q have in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zopro.zo.displacement import Displacement
from zopro.zo.records import StepRecord

STEP_KL = "step_kl"
"""What trainers log it as."""


def two_sided(at: Sequence[Displacement]) -> bool:
    """Whether each query of a step is looked at on both sides."""
    plus, minus = ({there.query for there in at if there.t * side > 0} for side in (1, -1))
    return plus == minus


def slopes_along(at: Sequence[Displacement], logprobs: Sequence[Tensor]) -> Tensor | None:
    """d log pi(y) / dt along each query's z, (queries, B) in nats for a unit of z.

    Two-sided they are half the differences. One-sided log pi(y) at theta is not known, and the differences among queries
    stand for them: as large as slopes along z that vary about 0, and in no other way the same. Rounding adds to them.

    Args:
        at: the displacements of one step.
        logprobs: for each of them those of the same answers, (B,) in nats.

    Returns:
        None where there are neither two sides nor two queries.

    >>> one = Displacement(seed=0, query=0, step=0, t=1.0, eps=(0.5,))
    >>> slopes_along([one, one.mirrored], [torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.0])])
    tensor([[1., 0.]])
    """
    found = {(there.query, there.t > 0): values.float() for there, values in zip(at, logprobs, strict=True) if there.t}
    unit = next((abs(there.t * there.eps[0]) for there in at if there.t), 1.0)
    plus = [values for (_, above), values in found.items() if above]
    if plus and two_sided(at):
        minus = [found[query, False] for query, above in found if above]
        return (torch.stack(plus) - torch.stack(minus)) / (2 * unit)
    if len(plus) < 2 or len(plus) < len(found):
        return None
    values = torch.stack(plus)
    return (values - values.mean(0)) / unit * (len(plus) / (len(plus) - 1)) ** 0.5


def step_kl(record: StepRecord, slopes: Tensor, joint: bool = True) -> float:
    """KL of the policy after a step to that before, in nats an answer.

    Args:
        slopes: (queries, answers) as `slopes_along` gives them.
        joint: they are slopes. False: they are as large as these, of z_q that have nothing in common.
    """
    moved = record.learning_rates[0] * torch.tensor(record.coefficients, dtype=torch.float32)
    if joint:
        return float((moved @ slopes.cpu()).square().mean()) / 2
    return float(moved.square().sum() * slopes.square().mean()) / 2
