"""Parameter groups of a torch optimiser as one list of named tensors, and what must hold for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

Group = dict[str, Any]  # as torch keeps it: "params", its options, and "param_names" where the user gave names
Entry = tuple[str, Tensor, Group]


def named(groups: list[Group]) -> list[Entry]:
    """(name, tensor, group) of every parameter, in order; unnamed tensors are called "<group>.<index>"."""
    entries = []
    for g, group in enumerate(groups):
        names = group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
        entries += [(name, tensor, group) for name, tensor in zip(names, group["params"], strict=True)]
    return entries


def movable(groups: list[Group], free: list[Tensor]) -> list[Entry]:
    """Those of `named` that are not frozen: that require grad, or are plain tensors which never did (`free`)."""
    ids = set(map(id, free))
    return [entry for entry in named(groups) if entry[1].requires_grad or id(entry[1]) in ids]


def trained(groups: list[Group], free: list[Tensor]) -> list[Entry]:
    """`movable`. Raises ValueError where there is none."""
    entries = movable(groups, free)
    if not entries:
        raise ValueError(
            "params: none has requires_grad=True, so there is nothing to train. Leave it on for what is to be trained: "
            "no graph is built."
        )
    return entries


def check(groups: list[Group]) -> None:
    """Raise ValueError for an option out of range, a tensor that cannot be displaced, or a name or tensor used twice."""
    for group in groups:
        lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
        if not 0 <= number(lr) < math.inf:
            raise ValueError(f"lr: must be finite and must not be negative, got {lr!r}")
        if eps != "auto" and not 0 < number(eps) < math.inf:
            raise ValueError(f"eps: must be a number greater than 0 or 'auto', got {eps!r}")
        if not 0 <= number(decay) < math.inf:
            raise ValueError(f"weight_decay: must be finite and must not be negative, got {decay!r}")
    names = set()
    at: dict[int, str] = {}  # address -> name
    for name, tensor, _ in named(groups):
        if name in names:
            raise ValueError(f"params: names must differ, or tensors would share their noise, got {name!r} twice")
        names.add(name)
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            continue
        if not (tensor.is_floating_point() and torch.finfo(tensor.dtype).bits >= 16):
            raise ValueError(
                f"params: {name!r} must be floating point of 16 bits or more, got {tensor.dtype}. Train adapters over it."
            )
        if kind := _unfit(tensor):
            raise ValueError(f"params: {name!r} must be dense, with memory of its own for every element, got {kind}.")
        if (address := _address(tensor)) in at:
            raise ValueError(
                f"params: tensors must not share memory, which would move twice, got {at[address]!r}, {name!r}. Name one."
            )
        if address:
            at[address] = name


def number(value: Any) -> float:
    """A number of any kind; NaN for what is none."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def check_seed(seed: Any) -> None:
    """Raise ValueError for what is no whole number: 1 and 1.0 would draw other noise."""
    if not hasattr(seed, "__index__"):
        raise ValueError(f"seed: must be a whole number, got {seed!r}")


def check_guess(name: str, guess: Any) -> None:
    """Raise ValueError for a guess at what "auto" finds that is no such number; None is no guess."""
    if guess is not None and not 0 < number(guess) < math.inf:
        raise ValueError(f"{name}: must be None, or finite and above 0, got {guess!r}")


def _unfit(tensor: Tensor) -> str | None:
    """What keeps a tensor from being written to in place; None where nothing does."""
    if tensor.is_meta:
        return "a tensor on meta: load or initialise it first"
    if tensor.layout is not torch.strided:
        return f"{tensor.layout}: call to_dense() on it"
    if tensor.numel() and any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
        return "an expanded tensor: call contiguous() on it"
    return None


def _address(tensor: Tensor) -> int:
    """Where a tensor begins; 0 where it has no memory of its own. Parts of one buffer that begin apart may be trained."""
    try:
        return tensor.data_ptr() if tensor.numel() else 0
    except RuntimeError:
        return 0
