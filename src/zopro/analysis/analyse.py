"""The analysis of a run, or of two folders of checkpoints: read once, numbers and trajectories as one plain object.

from zopro.analysis.analyse import analyse
from zopro.analysis.reading.checkpoints import of_run
numbers = analyse(*of_run(Path("RUN")))
numbers["metrics"]["update_angle_degrees"]["product"]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from zopro.analysis.numbers.gram import gram_matrices
from zopro.analysis.numbers.projection import extrapolations, pca, project
from zopro.analysis.numbers.series import Layout
from zopro.analysis.numbers.summary import all_numbers, plain
from zopro.analysis.reading.checkpoints import Trajectory
from zopro.analysis.reading.parts import Factors, Part, pair
from zopro.analysis.reading.streaming import Grams, Points
from zopro.errors import InputError
from zopro.system.threads import torch_threads
from zopro.weights.tensors import Stored

FORMAT = 1
COORDINATES = 10_000  # sampled for the distance correlation, which takes a sort of them


@torch_threads()
def analyse(
    policy: Trajectory,
    reward: Trajectory,
    *,
    coordinates: int = COORDINATES,
    reward_ema: float = 1.0,
    projections: Sequence[str] = ("pca",),
    seed: int = 0,
) -> dict[str, Any]:
    """Everything `analysis.json` holds.

    Args:
        policy, reward: checkpoints in time order; update i of the one belongs to update i of the other. Without a reward
            model the numbers about it are missing.
        coordinates: at most this many are sampled for the distance correlation.
        reward_ema: the reward checkpoints are moving averages E_t = w R_t + (1 - w) E_{t-1} with this weight w: the
            analysis is of R_t = E_{t-1} + (E_t - E_{t-1}) / w. 1: they are what they are.
        projections: of pca, tsne and umap.
        seed: of the sample, the resampling and the projections.

    Raises:
        InputError: the two have nothing in common, or a file is broken; the message names it.
    """
    if not 0 < reward_ema <= 1 or math.isnan(reward_ema):
        raise InputError(f"--reward-ema: must lie in (0, 1], got {reward_ema}.")
    if reward_ema < 1 and not reward.checkpoints:
        raise InputError(f"--reward-ema: must be 1 for a run without a reward model, got {reward_ema}.")
    if coordinates < 2:
        raise InputError(f"--coordinates: must be at least 2, got {coordinates}.")
    if not 0 <= seed < 2**32:  # as t-SNE and UMAP take it
        raise InputError(f"--seed: must lie in [0, 2^32), got {seed}.")
    pairing = pair(policy, reward)
    labels = [c.label for side in (policy, reward) for c in side.checkpoints]
    main = (*policy.main, *(len(policy.checkpoints) + i for i in reward.main))
    points = Points(len(policy.checkpoints), len(labels), main, reward_ema)
    if reward_ema < 1:
        _check_averages(pairing.parts, points)
    layout = Layout(len(policy.main), len(reward.main))
    grams = gram_matrices(pairing, points, coordinates, seed)
    with threadpool_limits(1):  # thousands of small matrices: more threads only wait for each other
        numbers = all_numbers(grams, layout, seed)
    return {
        "format": FORMAT,
        "policy": [str(c.path) for c in policy.checkpoints],
        "reward": [str(c.path) for c in reward.checkpoints],
        "iterations": [_iteration(policy, position) for position in policy.main[1:]],
        "views": list(grams),
        "dimension": {view: found.dimension for view, found in grams.items()},
        "tensors": len(pairing.parts),
        "left_out": pairing.left_out,
        "reward_ema": reward_ema,
        "seed": seed,
        **numbers,
        "trajectories": {
            view: {method: _trajectories(method, found, points, policy, reward, seed) for method in projections}
            for view, found in grams.items()
        },
    }


def _iteration(policy: Trajectory, position: int) -> int | str:
    checkpoint = policy.checkpoints[position]
    return checkpoint.label if checkpoint.iteration is None else checkpoint.iteration


def _check_averages(parts: Sequence[Part], points: Points) -> None:
    """Raise InputError where the reward model's averages cannot be taken apart."""
    if len(points.main) < points.total:
        raise InputError("--reward-ema: must be 1 where there are snapshots inside an iteration.")
    if any(isinstance(part.rows[0], Stored) and isinstance(part.rows[-1], Factors) for part in parts):
        raise InputError("--reward-ema: must be 1 for adapters beside a policy of whole weights.")


def _trajectories(
    method: str, grams: Grams, points: Points, policy: Trajectory, reward: Trajectory, seed: int
) -> dict[str, Any]:
    """Coordinates of the trajectories in 2 and 3 dimensions; each is measured from its own start."""
    sides = [(side, start) for side, start in ((policy, 0), (reward, points.policy)) if side.checkpoints]
    positions = [[start + i for i in side.main] for side, start in sides]
    predicted = [extrapolations(where, points.total) for where in positions]
    found: dict[str, Any] = {}
    for dimensions in (2, 3):
        placed = project(method, grams.total, np.concatenate(predicted), dimensions, seed)
        after = points.total
        for (side, start), others in zip(sides, predicted, strict=True):
            end = start + len(side.checkpoints)
            entry = found.setdefault(
                side.name,
                {"labels": [c.label for c in side.checkpoints], "main": side.main, "points": {}, "predicted": {}},
            )
            entry["points"][f"{dimensions}d"] = placed[start:end].tolist()
            entry["predicted"][f"{dimensions}d"] = placed[after : after + len(others)].tolist()
            after += len(others)
    if method == "pca":
        found["explained_variance"] = pca(grams.total, np.concatenate(predicted), 3)[1].tolist()
    return dict(plain(found))
