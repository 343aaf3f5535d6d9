"""Small problems for the optimiser: a network and its loss, and what autograd says of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from zopro.zo import Directions, Gaussian, LowRank, Rademacher, Signs, Targeted

Problem = tuple[nn.Module, Callable[[], Tensor]]


def mlp(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Problem:
    """Two layers with a norm between them, on a fixed batch."""
    module = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(12, 6, dtype=dtype), torch.randint(3, (12,))
    return module, lambda: nn.functional.cross_entropy(module(x).float(), y)


def lora_over_bf16() -> Problem:
    """Adapters in fp32 over a bf16 base, both factors away from 0."""
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    module = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    x, y = torch.randn(12, 6).bfloat16(), torch.randint(3, (12,))
    return module, lambda: nn.functional.cross_entropy(module(x).float(), y)


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def gradient(module: nn.Module, closure: Callable[[], Tensor]) -> dict[str, Tensor]:
    named = trainable(module)
    grads = torch.autograd.grad(closure(), [p for _, p in named])
    return {name: grad for (name, _), grad in zip(named, grads, strict=True)}


def slope(module: nn.Module, closure: Callable[[], Tensor], directions: Directions, seed: int = 0) -> float:
    """Autograd's derivative of the loss along the direction of step 0."""
    return float(flat(gradient(module, closure)) @ flat(directions.sample(trainable(module), seed, 0)))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def previous(module: nn.Module) -> Targeted:
    named = trainable(module)
    return Targeted({n: torch.randn_like(p) for n, p in named}, {n: torch.randn_like(p) for n, p in named}, 10)


DIRECTIONS = {
    "gaussian": lambda m: Gaussian(),
    "rademacher": lambda m: Rademacher(),
    "low_rank": lambda m: LowRank(),
    "signs": lambda m: Signs({n: torch.randn_like(p) for n, p in trainable(m)}),
    "targeted": previous,
}
