"""A model whose parts are read by some batches only, and how optimisers step over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MODES: dict[str, dict[str, Any]] = {
    "in place": {"perturbation": "in_place"},
    "virtual": {"perturbation": "virtual"},
    "one-sided": {"sides": 1, "queries": 2},
    "auto": {"eps": "auto", "second_moment_beta": 0.9},
}


class Two(nn.Module):
    """A model on text with a branch for images, an unused head and a gate that is 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(4, 6), nn.Sequential(nn.Linear(3, 6), nn.Tanh())
        self.head, self.value = nn.Linear(6, 3), nn.Linear(6, 1)
        self.gate, self.gated = nn.Parameter(torch.zeros(())), nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = self.text(x)
        if images is not None:
            hidden = hidden + self.image(images)
        hidden = self.frozen(hidden).tanh() + self.gate * self.gated(hidden)
        return self.head(hidden), self.value(hidden)


X, Y, IMAGES = torch.arange(20.0).view(5, 4).sin(), torch.tensor([0, 1, 2, 1, 0]), torch.arange(15.0).view(5, 3).cos()


def loss_of(model: nn.Module, images: Tensor | None = None) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        logits, value = model(X, images)
        unused = 0.0 * sum(p.sum() for p in model.parameters())  # as DDP's users write it
        return nn.functional.cross_entropy(logits, Y) + unused + 0 * value.sum()

    return loss


def moved(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(before[name], p)}


IMAGE = {"image.0.weight", "image.0.bias"}
UNREAD = {*IMAGE, "value.weight", "value.bias"}
FROZEN = {"frozen.weight", "frozen.bias"}
