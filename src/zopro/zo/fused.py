"""Many small tensors in few kernels: all of them by one multi-tensor kernel, or those of one size as rows of a matrix.

On a GPU a model's hundreds of adapter tensors wait for the launch of every kernel, whatever little it computes. On a CPU
there is nothing to wait for, and tensors are taken one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zopro.zo.directions.there import waits


def fuses(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are taken all at once: in fp32, on devices that wait for launches."""
    return len(tensors) > 0 and all(tensor.dtype == torch.float32 and waits(tensor.device) for tensor in tensors)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of their values."""
    made = [torch.empty_like(tensor) for tensor in tensors]
    put(made, tensors)
    return made


def put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values to tensors, in place."""
    torch._foreach_copy_([tensor.detach() for tensor in tensors], list(values))


def displace(tensors: Sequence[Tensor], originals: Sequence[Tensor], offsets: list[Tensor]) -> None:
    """tensor <- original + offset, in place; uses up the offsets."""
    torch._foreach_add_(offsets, list(originals))
    put(tensors, offsets)


def scaled(tensors: Sequence[Tensor], factors: Sequence[float]) -> list[Tensor]:
    """Each tensor times its factor, as new ones."""
    return list(torch._foreach_mul(list(tensors), list(factors)))


def step(tensors: Sequence[Tensor], directions: Sequence[Tensor], alpha: float) -> None:
    """tensor <- tensor + alpha direction, in place."""
    if tensors:
        torch._foreach_add_([tensor.detach() for tensor in tensors], list(directions), alpha=alpha)


def shrink(tensors: Sequence[Tensor], factor: float) -> None:
    """tensor <- factor tensor, in place."""
    if tensors:
        torch._foreach_mul_([tensor.detach() for tensor in tensors], factor)
