"""Differences of losses around theta, which times 1 / eps are slopes: central (two-sided) or forward (one-sided)."""

from __future__ import annotations

from collections.abc import Sequence

from zopro.zo.displacements import Displacements
from zopro.zo.evaluation import Evaluator
from zopro.zo.perturbation import Offset
from zopro.zo.records import Estimate

KNOWN_LOSS_TOLERANCE = 0.1  # of the difference L(theta + eps z) - L(theta)


def central(evaluate: Evaluator, around: Displacements, seeds: Sequence[int]) -> Estimate:
    """Of each seed's direction, from two evaluations."""
    values = evaluate.losses([around.at(seed, sign) for seed in seeds for sign in (1.0, -1.0)])
    pairs = list(zip(values[0::2], values[1::2], strict=True))
    return Estimate(pairs, [(plus - minus) / 2 for plus, minus in pairs])


def forward(
    evaluate: Evaluator, around: Displacements, seeds: Sequence[int], known: float | None, trusted: bool | None
) -> tuple[Estimate, bool | None]:
    """Of each seed's direction, from one evaluation, and one at theta for all.

    Args:
        known: L(theta), where it is known; it takes the place of the evaluation if it is trusted.
        trusted: None: not compared yet.

    Returns:
        The estimate, and whether what is known is trusted: if it would move the slopes by no more than a tenth.
    """
    offsets: list[Offset | None] = [around.at(seed, 1.0) for seed in seeds]
    if known is not None and trusted:
        at_theta, values = known, evaluate.losses(offsets)
    else:
        at_theta, *values = evaluate.losses([None, *offsets])
        if known is not None and trusted is None:
            slopes = sum(abs(plus - at_theta) for plus in values) / len(values)
            trusted = abs(known - at_theta) <= KNOWN_LOSS_TOLERANCE * slopes
    return Estimate([(plus, at_theta) for plus in values], [plus - at_theta for plus in values]), trusted
