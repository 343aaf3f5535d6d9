"""Updates and norms that stay on a GPU: a copy or a number read back for every tensor keeps it waiting for the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ON = {"cuda"}  # kinds of device; a CPU's memory is the host's own
KEPT = 2**26  # elements of fp32, 256 MiB; what is beyond, as of a whole model, is copied for each use


def waits(device: torch.device) -> bool:
    """Whether the host and this device wait for each other."""
    return device.type in ON


class Moved:
    """The tensors of an update as fp32 on the device that asks, copied there once.

    Args:
        update: name -> tensor. May be a lazy mapping.
    """

    def __init__(self, update: Mapping[str, Tensor]) -> None:
        self._update = update
        self._kept: dict[tuple[str, torch.device], Tensor] = {}
        self._room = KEPT

    def at(self, name: str, device: torch.device) -> Tensor:
        """Not to be changed."""
        kept = self._kept.get((name, device))
        if kept is not None:
            return kept
        tensor = self._update[name].to(device=device, dtype=torch.float32)
        if waits(device) and tensor.numel() <= self._room:
            self._kept[name, device] = tensor
            self._room -= tensor.numel()
        return tensor


def norm(tensor: Tensor) -> Tensor:
    """`zopro.zo.directions.base.norm_of`, the same number, as 0-dimensional fp64 on the tensor's device."""
    wide = tensor.float()
    largest = torch.linalg.vector_norm(wide, ord=torch.inf)
    scaled = largest.double() * torch.linalg.vector_norm(wide / largest).double()
    return torch.where((largest > 0) & (largest < torch.inf), scaled, largest.double())


def rescaled(noise: Tensor, wanted: float, least: float) -> Tensor:
    """`noise` with the given norm, in place; 0 where its own is not above `least`."""
    current = norm(noise)
    nothing = ~(current > least)
    factor = torch.where(nothing, 0.0, wanted / current).float()
    return noise.mul_(factor).masked_fill_(nothing, 0.0)
