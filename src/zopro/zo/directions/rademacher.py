"""Random signs: Spall's own choice."""

from __future__ import annotations

import torch
from torch import Tensor

from zopro.zo.directions.base import Directions, tensor_generator


class Rademacher(Directions):
    """z uniform on {-1, +1}^d: Spall's original choice (1992). One random byte gives eight entries, which makes it the
    cheap choice where noise is drawn for every parameter of a model.

    >>> Rademacher().sample([("w", torch.zeros(100))], seed=0, step=3)["w"].unique()
    tensor([-1.,  1.])
    """

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        generator = tensor_generator(name, seed, step, like.device)
        count = like.numel()
        packed = torch.empty((count + 7) // 8, dtype=torch.uint8, device=like.device).random_(generator=generator)
        bits = torch.arange(256, device=like.device)[:, None] >> torch.arange(8, device=like.device) & 1
        signs = torch.nn.functional.embedding(packed.int(), bits.float().mul_(2).sub_(1))  # (count / 8, 8)
        return signs.flatten()[:count].view(like.shape)
