"""One recorded step applied to the parameters: theta <- theta - lr (g z + weight_decay theta)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zopro.errors import InputError
from zopro.zo.directions import Directions
from zopro.zo.groups import Entry, Group
from zopro.zo.monitor import ResolutionMonitor
from zopro.zo.records import StepRecord

LARGEST = 1e9  # change of a weight in one step, in units of z, beyond which there is a mistake


def check_size(record: StepRecord, entries: Sequence[Entry], groups: Sequence[Group]) -> None:
    """Raise InputError for a step that would leave `entries` useless, or infinite in a narrow dtype."""
    place = {id(group): index for index, group in enumerate(groups)}
    for _, tensor, group in entries:
        g = place[id(group)]
        lr = record.learning_rates[g]
        along = sum(abs(coefficient) for coefficient in record.coefficients) * record.eps[0] / record.eps[g]
        size = lr * max(along, record.weight_decay[g])
        if not size < min(LARGEST, torch.finfo(tensor.dtype).max / 10):
            raise InputError(
                f"lr: must leave weights that a network can work with, got {lr:g}, with which this step would change "
                f"them by about {size:.2g}. Lower the learning rate."
            )


def take(
    record: StepRecord,
    entries: Sequence[Entry],
    groups: Sequence[Group],
    directions: Directions,
    seeds: Sequence[int],
    resolution: ResolutionMonitor,
) -> None:
    """Move `entries` in place; of the same numbers always to the same bits.

    Args:
        entries: what moves, a part of `groups`, whose order is that of the record.
        seeds: of each query's direction.
        resolution: sees how much of each tensor's step its dtype can hold.
    """
    place = {id(group): index for index, group in enumerate(groups)}
    for name, tensor, group in entries:
        g = place[id(group)]
        lr = record.learning_rates[g]
        wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))  # the tensor itself if it is wide
        if record.weight_decay[g] and tensor.dim() >= 2:
            wide.mul_(1 - lr * record.weight_decay[g])
        for seed, coefficient in zip(seeds, record.coefficients, strict=True):
            z = directions.tensor(name, tensor, seed, record.step)
            wide.sub_(z, alpha=lr * coefficient * record.eps[0] / record.eps[g])
        if wide.dtype != tensor.dtype:
            resolution.see(tensor.detach(), wide)
            tensor.detach().copy_(wide)
    torch.clear_autocast_cache()  # an autocast around the step may hold casts of the old values
