"""How far a population is displaced: sigma grown or shrunk so that its rewards say something and stay near.

Members too close to theta differ by sampling noise alone; members too far are no longer the model whose slope is wanted.
In between, where members' mean rewards differ about twice as much as noise alone would make them, lies what is wanted.
"""

from __future__ import annotations

import math

FIRST = 1e-2  # sigma of the first step where it is "auto": adapters' factors have entries of about this size
TARGET = 4.0  # between / noise: members' mean rewards have twice the standard deviation that noise gives them
RATE = 0.2  # of log sigma, relative to log(TARGET x noise / between)
LARGEST_CHANGE = 1.1  # in one step
FARTHEST = 30.0  # from the first sigma, either way


def factor(between: float, noise: float, so_far: float = 1.0) -> float:
    """What to multiply sigma by after a step.

    Args:
        between, noise: mean squares as `zopro.zo.shaping.spread` gives them.
        so_far: by how much sigma has changed since the first step.

    Returns:
        In [1 / LARGEST_CHANGE, LARGEST_CHANGE], and such that sigma stays within `FARTHEST` of the first one. 1 where
        the noise is not known; more than 1 where members do not differ.

    >>> factor(4.0, 1.0)
    1.0
    >>> factor(1.0, 1.0), round(factor(40.0, 1.0), 3)  # noise alone; far more than noise
    (1.1, 0.909)
    """
    if math.isnan(between) or math.isnan(noise):
        return 1.0
    if between == 0 or noise == 0:
        change = LARGEST_CHANGE if between == 0 else 1 / LARGEST_CHANGE
    else:
        change = min(max((between / noise / TARGET) ** -RATE, 1 / LARGEST_CHANGE), LARGEST_CHANGE)
    return min(max(change, 1 / FARTHEST / so_far), FARTHEST / so_far)
