"""What a step measured and did, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """What one `measure` found: per query, the losses at theta + eps z and theta - eps z (or theta, one-sided).

    >>> Estimate(losses=[(3.0, 1.0)], differences=[1.0]).loss
    2.0
    """

    losses: list[tuple[float, float]]
    differences: list[float]  # per query, half the central difference or the forward difference: eps * slope
    left_out: frozenset[str] = frozenset()  # names of the tensors that were not displaced

    @property
    def loss(self) -> float:
        """L(theta): as evaluated if one-sided, else the mean of all evaluations, which is off by O(eps^2)."""
        return sum(plus - difference for (plus, _), difference in zip(self.losses, self.differences, strict=True)) / len(
            self.losses
        )

    @property
    def differs(self) -> bool:
        """Whether the displacements show in any loss."""
        return any(plus != other for plus, other in self.losses)

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for pair in self.losses for value in pair)


@dataclass
class Accumulated:
    """The weighted sum of the estimates of a step's micro-batches."""

    differences: list[float] = field(default_factory=list)
    weight: float = 0.0
    loss: float = 0.0
    squared_signal: float = 0.0
    count: int = 0
    finite: bool = True
    left_out: set[str] = field(default_factory=set)

    def add(self, estimate: Estimate, weight: float) -> None:
        before = self.differences or [0.0] * len(estimate.differences)
        self.differences = [a + weight * b for a, b in zip(before, estimate.differences, strict=True)]
        self.weight += weight
        self.loss += weight * estimate.loss
        self.squared_signal += sum((plus - minus) ** 2 for plus, minus in estimate.losses) / len(estimate.losses)
        self.count += 1
        self.finite = self.finite and estimate.finite
        self.left_out.update(estimate.left_out)

    @property
    def signal(self) -> float:
        """Root mean square of L+ - L- over queries and micro-batches."""
        return math.sqrt(self.squared_signal / self.count)


@dataclass(frozen=True)
class StepRecord:
    """What one step did: with the starting point, enough to replay it (`Weights.apply`)."""

    step: int
    seed: int
    projected_gradients: list[float]  # g of each query, before `second_moment_beta` scales it
    coefficients: list[float]  # what each z was multiplied by, before lr
    learning_rates: list[float]  # of each parameter group
    eps: list[float]  # of each parameter group; NaN where "auto" found no finite loss to measure
    weight_decay: list[float]  # of each parameter group
    loss: float
    signal_to_noise: float  # |L+ - L-| / (sqrt(2) sigma); NaN where the noise floor was not measured
    skipped: bool
    left_out: list[str] = field(default_factory=list)  # names of the tensors that stay: frozen, or never read by the loss
    momentum: float = 0.0  # decay of the running mean of sum g z, and
    second_moment: float = 0.0  # of its square, which are made of the records before (`zopro.zo.moments`)
    anchor: float = 0.0  # share of the way back to where the records begin

    @property
    def has_moments(self) -> bool:
        return bool(self.momentum or self.second_moment)

    @property
    def projected_gradient(self) -> float:
        return sum(self.projected_gradients) / len(self.projected_gradients) if self.projected_gradients else math.nan
