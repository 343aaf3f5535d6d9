"""How well rewards follow scores."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence


def correlations(rewards: Sequence[float], scores: Sequence[float]) -> dict[str, float]:
    """`pearson` and `spearman` of `n` pairs; NaN where one side is constant, or of fewer than two.

    >>> correlations([1.0, 2.0, 4.0], [0.0, 1.0, 2.0])["spearman"]
    1.0
    """
    if len(scores) < 2:
        return {"pearson": math.nan, "spearman": math.nan, "n": len(scores)}
    from scipy import stats  # takes a second

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        pearson, spearman = (function(rewards, scores).statistic for function in (stats.pearsonr, stats.spearmanr))
    return {"pearson": float(pearson), "spearman": float(spearman), "n": len(scores)}
