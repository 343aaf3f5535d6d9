"""Noise of a user's, as `noise: python:hostile_noise:NAME`, each of which a step could not be made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zopro.zo.directions import Directions


class Raises(Directions):
    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        raise RuntimeError("no luck")


class Nothing(Directions):
    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Any:
        return None


class Double(Directions):
    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        return torch.ones(like.shape, dtype=torch.float64)


class Flat(Directions):
    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        return torch.ones(like.numel())


class Infinite(Directions):
    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        return torch.full_like(like, torch.inf)


class Kept(Directions):
    def __init__(self) -> None:
        self.kept: dict[torch.Size, Tensor] = {}

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        return self.kept.setdefault(like.shape, torch.ones(like.shape))


class Free(Directions):
    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        return torch.randn(like.shape)
