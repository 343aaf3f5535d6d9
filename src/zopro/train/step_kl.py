"""How far a zeroth-order step moves the policy: its KL, of log-probs that the step has asked for anyway.

Along z the KL of pi(theta + t z) to pi(theta) is t^2 F / 2 to second order, where F is the Fisher information along z:
the mean square, over the policy's own answers y, of d log pi(y) / dt. The two sides of each query give that slope.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zopro.zo.displacement import Displacement
from zopro.zo.records import StepRecord

STEP_KL = "step_kl"
"""What trainers log it as."""


def fisher_along(at: Sequence[Displacement], logprobs: Sequence[Tensor]) -> list[float]:
    """The Fisher information along each query's z, in nats^2 for a unit of z.

    Two-sided of half the differences; one-sided, the same for all, of the differences among queries, since slopes along
    independent z vary about 0. Rounding adds to it, so it is an upper bound where the log-probs are rough.

    Args:
        at: the displacements of one step.
        logprobs: for each of them those of the same answers, (B,) in nats.

    Returns:
        Nothing where there are neither two sides nor two queries.

    >>> import torch
    >>> one = Displacement(seed=0, query=0, step=0, t=1.0, eps=(0.5,))
    >>> fisher_along([one, one.mirrored], [torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.0])])  # slopes 1 and 0
    [0.5]
    """
    found = {(there.query, there.t): values.float() for there, values in zip(at, logprobs, strict=True) if there.t}
    plus = {query: values for (query, t), values in found.items() if t > 0}
    minus = {query: values for (query, t), values in found.items() if t < 0}
    unit = next((abs(there.t * there.eps[0]) for there in at if there.t), 1.0)
    if plus.keys() == minus.keys():
        return [float(((plus[query] - minus[query]) / (2 * unit)).square().mean()) for query in plus]
    if len(plus) < 2 or minus:
        return []
    mean = sum(plus.values()) / len(plus)
    squares = sum(float(((values - mean) / unit).square().mean()) for values in plus.values())
    return [squares / (len(plus) - 1)] * len(plus)


def step_kl(record: StepRecord, fisher: Sequence[float]) -> float:
    """KL of the policy after a step to that before, in nats an answer, where its queries' z do not overlap."""
    moved = [record.learning_rates[0] * each for each in record.coefficients]
    return sum(far**2 * each for far, each in zip(moved, fisher, strict=True)) / 2
