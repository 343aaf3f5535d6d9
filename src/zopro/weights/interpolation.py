"""Weights between a reward model and its predecessor (arXiv 2503.03460; default weight 0.5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from zopro.errors import InputError
from zopro.weights.adapters import adapter_tensors

State = Mapping[str, Tensor]


def read_state(source: State | str | Path) -> State:
    """Name -> tensor of an adapter and its head, from a folder written by `RewardModel.save` (or given as it is)."""
    if isinstance(source, Mapping):
        return source
    return adapter_tensors(source)


def check_same_tensors(left: State, right: State, argument: str) -> None:
    """Raise `InputError` naming the first tensor that only one of the two has, or whose shape differs."""
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            where = "is missing" if name not in left else "is not in the other reward model"
            raise InputError(f"{argument}: must have the same tensors, but {name!r} {where}.")
        if left[name].shape != right[name].shape:
            shapes = f"{tuple(left[name].shape)} and {tuple(right[name].shape)}"
            raise InputError(f"{argument}: must have tensors of the same shape, got {shapes} for {name!r}.")


def interpolate(previous: State | str | Path, refined: State | str | Path, weight: float) -> dict[str, Tensor]:
    """weight * refined + (1 - weight) * previous, for every tensor of the adapter and the head.

    Computed in float32 on the refined tensor's device and returned in its type; 0 and 1 give back either end exactly.

    Raises:
        InputError: `weight` outside [0, 1], or the two do not have the same tensors in the same shapes.

    >>> interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, weight=0.25)
    {'w': tensor([0.2500, 0.2500])}
    """
    if not 0 <= weight <= 1:
        raise InputError(f"weight: must lie in [0, 1], got {weight!r}.")
    old, new = read_state(previous), read_state(refined)
    check_same_tensors(old, new, "previous")
    if weight in (0, 1):
        ends = new if weight == 1 else old
        return {name: ends[name].detach().to(new[name], copy=True) for name in new}
    return {
        name: torch.lerp(old[name].to(new[name].device, torch.float32), new[name].detach().float(), weight).to(new[name])
        for name in new
    }
