"""Named tensors for directions: their shapes, and random updates of them."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = {"layer.lora_A.weight": (4, 6), "layer.lora_B.weight": (6, 4), "twin": (4, 6), "bias": (5,), "gate": (1,)}
PARAMS = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]


def random_update(seed: int, scale: float = 1.0, names: tuple[str, ...] = tuple(SHAPES)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(SHAPES[name], generator=generator) for name in names}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
