"""Metrics over iterations from Gram matrices: cosines of linear combinations of checkpoints.

With p_0 ... p_n the policies (p_0 after SFT) and r_0 ... r_m the reward models, iteration i makes the updates
u_i = p_{i+1} - p_i and v_i = r_{i+1} - r_i, and from the second one on the velocities u_i - u_{i-1} and v_i - v_{i-1}
(policy-reward interplay: Galatolo et al. 2025, arXiv 2503.03460). Every metric here is a function of six sums over
coordinates of two such combinations a and b,

    <a, b>, <a, a>, <b, b>, <a, 1>, <b, 1>, D,

so it can be had for a layer, for the whole, and for a bootstrap sample of tensors alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

ZERO = 1e-12  # |a|^2 below this share of its model's largest squared displacement is rounding: there was no such update


@dataclass(frozen=True)
class Layout:
    """How many main rows are the policy's and the reward model's: P = policy + reward."""

    policy: int
    reward: int

    @property
    def iterations(self) -> int:
        """Policy updates, of which there is one per iteration."""
        return self.policy - 1

    def policy_updates(self, back: int = 0) -> np.ndarray:
        """[iterations, P]: u_{i - back} as coefficients of the rows; NaN where there is none."""
        return self._updates(0, self.policy, back)

    def reward_updates(self, back: int = 0) -> np.ndarray:
        """[iterations, P]: v_{i - back}; `back=1` pairs a reward update with the policy update that follows it."""
        return self._updates(self.policy, self.reward, back)

    def _updates(self, start: int, length: int, back: int) -> np.ndarray:
        rows = np.full((self.iterations, self.policy + self.reward), np.nan)
        for i in range(self.iterations):
            if 0 <= i - back < length - 1:
                rows[i] = 0
                rows[i, start + i - back + 1], rows[i, start + i - back] = 1, -1
        return rows


@dataclass(frozen=True)
class SixSums:
    """The sums of `a` and `b` for every part and iteration, each [n, iterations]; `count` is [n, 1]."""

    ab: np.ndarray
    aa: np.ndarray
    bb: np.ndarray
    a1: np.ndarray
    b1: np.ndarray
    count: np.ndarray
    floor_a: np.ndarray  # [n, 1] what counts as zero beside the part's displacements in the rows that `a` combines
    floor_b: np.ndarray  # [n, 1] of `b`, likewise

    def weighted(self, weights: np.ndarray) -> SixSums:
        """Sums over parts, each counted `weights` [m, n] times."""
        return SixSums(**{name: weights @ np.nan_to_num(value) * _defined(value) for name, value in vars(self).items()})


def _defined(value: np.ndarray) -> np.ndarray:
    """1 for iterations that are defined, NaN for the others."""
    return np.where(np.isnan(value).any(0, keepdims=True), np.nan, 1.0)


def six_sums(gram: np.ndarray, sums: np.ndarray, counts: np.ndarray, a: np.ndarray, b: np.ndarray) -> SixSums:
    """The six sums of combinations `a` and `b` [iterations, P] from gram [n, P, P], sums [n, P] and counts [n]."""

    def inner(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.einsum("ip,npq,iq->ni", left, gram, right, optimize=True)

    squares = np.einsum("npp->np", gram)
    floors = (ZERO * (squares * np.nan_to_num(side).any(0)).max(1, keepdims=True) for side in (a, b))
    a1, b1 = (np.einsum("ip,np->ni", side, sums) for side in (a, b))
    return SixSums(inner(a, b), inner(a, a), inner(b, b), a1, b1, counts[:, None].astype(float), *floors)


def cosine(s: SixSums) -> np.ndarray:
    """cos(a, b) = <a, b> / (|a| |b|), in [-1, 1]; NaN where either is zero or not defined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = s.ab / np.sqrt(s.aa * s.bb)
    return np.where((s.aa > s.floor_a) & (s.bb > s.floor_b), np.clip(value, -1, 1), np.nan)


def angle(s: SixSums) -> np.ndarray:
    """arccos of the cosine, in degrees: 90 is orthogonal."""
    return np.degrees(np.arccos(cosine(s)))


def pearson(s: SixSums) -> np.ndarray:
    """Pearson's correlation over coordinates: the cosine of a - mean(a) and b - mean(b) (K. Pearson 1895)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ab, aa, bb = s.ab - s.a1 * s.b1 / s.count, s.aa - s.a1**2 / s.count, s.bb - s.b1**2 / s.count
        value = ab / np.sqrt(aa * bb)
    # A constant vector has no correlation; what is left of its variance is rounding.
    varies = (aa > s.floor_a + 1e-14 * s.aa) & (bb > s.floor_b + 1e-14 * s.bb)
    return np.where(varies, np.clip(value, -1, 1), np.nan)


def extrapolation_error(s: SixSums) -> np.ndarray:
    """|u_i - u_{i-1}| / |u_i|: how far p_i + u_{i-1} is from p_{i+1}, in lengths of the step that came.

    0: the straight line was right. 1: staying would have been as good. sqrt(1 + |u_{i-1}|^2 / |u_i|^2) is what
    orthogonal updates of these lengths give.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.sqrt(np.maximum(s.aa - 2 * s.ab + s.bb, 0) / s.aa)
    return np.where(s.aa > s.floor_a, value, np.nan)


def norm(s: SixSums) -> np.ndarray:
    """|a|."""
    return np.sqrt(np.maximum(s.aa, 0))


@dataclass(frozen=True)
class Metric:
    """One metric: which combinations it compares, and how. `centred`: means are taken off, which costs a dimension."""

    name: str
    value: Callable[[SixSums], np.ndarray]
    a: Callable[[Layout, int], np.ndarray]
    b: Callable[[Layout, int], np.ndarray]
    centred: bool = False

    def sums(self, layout: Layout, gram: np.ndarray, sums: np.ndarray, counts: np.ndarray, shift: int = 0) -> SixSums:
        """Its six sums; `shift=1` pairs each reward update with the policy update of the next iteration."""
        return six_sums(gram, sums, counts, self.a(layout, shift), self.b(layout, shift))


def _velocities(updates: Callable[[int], np.ndarray]) -> np.ndarray:
    return updates(0) - updates(1)


BETWEEN = (
    Metric("update_angle_degrees", angle, lambda x, s: x.policy_updates(), lambda x, s: x.reward_updates(s)),
    Metric(
        "velocity_angle_degrees",
        angle,
        lambda x, s: _velocities(x.policy_updates),
        lambda x, s: x.reward_updates(s) - x.reward_updates(s + 1),
    ),
    Metric("update_pearson", pearson, lambda x, s: x.policy_updates(), lambda x, s: x.reward_updates(s), True),
)
"""Policy against reward model."""

WITHIN = (
    Metric("policy_momentum_cosine", cosine, lambda x, s: x.policy_updates(), lambda x, s: x.policy_updates(1)),
    Metric("reward_momentum_cosine", cosine, lambda x, s: x.reward_updates(), lambda x, s: x.reward_updates(1)),
    Metric(
        "policy_extrapolation_error",
        extrapolation_error,
        lambda x, s: x.policy_updates(),
        lambda x, s: x.policy_updates(1),
    ),
    Metric(
        "reward_extrapolation_error",
        extrapolation_error,
        lambda x, s: x.reward_updates(),
        lambda x, s: x.reward_updates(1),
    ),
    Metric("policy_update_norm", norm, lambda x, s: x.policy_updates(), lambda x, s: x.policy_updates()),
    Metric("reward_update_norm", norm, lambda x, s: x.reward_updates(), lambda x, s: x.reward_updates()),
)
"""Each update with the one before."""
