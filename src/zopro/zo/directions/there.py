"""Updates and norms that stay on a GPU: a copy or a number read back for every tensor keeps it waiting for the host.

And what a device without float64 takes in its place: float32 there, or float64 on the CPU for a few numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ON = {"cuda", "mps"}  # kinds of device; a CPU's memory is the host's own
NARROW = {"mps"}  # kinds of device that have no float64
KEPT = 2**26  # elements of fp32, 256 MiB; what is beyond, as of a whole model, is copied for each use


def waits(device: torch.device) -> bool:
    """Whether the host and this device wait for each other."""
    return device.type in ON


def widest(device: torch.device) -> torch.dtype:
    """The widest type that the device has."""
    return torch.float32 if device.type in NARROW else torch.float64


def in_float64(tensor: Tensor) -> Tensor:
    """In float64: where it is, or on the CPU where its device has none."""
    return (tensor.cpu() if tensor.device.type in NARROW else tensor).double()


def summable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As they are; where the device has no float64, on the CPU in float64. A few numbers each."""
    return tuple(in_float64(tensor) if tensor.device.type in NARROW else tensor for tensor in tensors)


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
    """`zopro.zo.directions.base.norm_of`, the same number, as 0-dimensional fp64 on the tensor's device.

    Where the device has no fp64 it is an fp32 number, of the same bits but for a rounding.
    """
    wide, dtype = tensor.float(), widest(tensor.device)
    largest = torch.linalg.vector_norm(wide, ord=torch.inf)
    scaled = largest.to(dtype) * torch.linalg.vector_norm(wide / largest).to(dtype)
    return torch.where((largest > 0) & (largest < torch.inf), scaled, largest.to(dtype))


def rescaled(noise: Tensor, wanted: float, least: float) -> Tensor:
    """`noise` with the given norm, in place; 0 where its own is not above `least`."""
    current = norm(noise)
    nothing = ~(current > least)
    factor = torch.where(nothing, 0.0, wanted / current).float()
    return noise.mul_(factor).masked_fill_(nothing, 0.0)
