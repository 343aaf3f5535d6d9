"""eps where it is "auto", and the noise floor of the loss: measured once, at the first estimate that can be."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from zopro.zo.displacements import Displacements
from zopro.zo.evaluation import Evaluator
from zopro.zo.groups import Group
from zopro.zo.schedules import auto_eps, loss_noise

logger = logging.getLogger(__name__)


def calibrate(groups: Sequence[Group], evaluate: Evaluator, around: Displacements, seed: int, sides: int) -> float:
    """Set each group's eps that is to be chosen, by evaluations along the direction of `seed`; return the noise floor.

    Where the loss is constant or not finite nothing can be measured: NaN, and the next estimate tries again.
    """
    automatic = [group for group in groups if group["auto_eps"]]
    scale = around.scale(seed)

    def loss_at(t: float) -> float:
        return evaluate.losses([around.at(seed, t, eps=1.0)])[0]

    if not automatic:
        return loss_noise(loss_at, groups[0]["eps"], scale)
    eps, noise = auto_eps(loss_at, scale, sides)
    for group in automatic:
        group["eps"] = "auto" if math.isnan(eps) else eps
    logger.info("noise floor of the loss %.3g, eps %.3g", noise, eps)
    return noise
