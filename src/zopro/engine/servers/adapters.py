"""A policy in PEFT without its network: the adapter's tensors, and modules of the right names and shapes to put it on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from zopro.errors import InputError
from zopro.weights.adapters import tensor_name
from zopro.weights.live import saved_state, variant_name
from zopro.zo import Weights


def hollow(model: nn.Module) -> None:
    """Take the weights out: each tensor becomes one zero, read as often as its shape says, so that it takes no memory."""
    made: dict[int, Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                zeros = made.setdefault(id(parameter), nn.Parameter(zeros, requires_grad=False))
                module._parameters[name] = zeros  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)


def lora_tensors(model: Any) -> tuple[dict[str, Tensor], float]:
    """A and B of the active adapter by plain names, and alpha; none where adapters are switched off.

    Raises InputError: modules with different scales, which an engine of its own takes one of; or more than A and B.
    """
    found: dict[str, Tensor] = {}
    alphas: set[float] = set()
    active: set[str] = set()
    more: set[str] = set()
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters:
            active.update(layer.active_adapters)
            more.update(variant_name(variant) for variant in getattr(layer, "lora_variant", {}).values())
        if isinstance(layer, LoraLayer) and not layer.disable_adapters:
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    module = tensor_name(name)
                    found[f"{module}.lora_A.weight"] = layer.lora_A[adapter].weight
                    found[f"{module}.lora_B.weight"] = layer.lora_B[adapter].weight
                    alphas.add(layer.scaling[adapter] * layer.r[adapter])
    if len(alphas) > 1:
        raise InputError(f"engine: must be given an adapter with one alpha, got {sorted(alphas)}.")
    saved = {tensor_name(name) for adapter in active for name in saved_state(model, adapter)}
    if more := {*more, *saved - found.keys()}:
        raise InputError(
            f"engine: must be given an adapter of A and B alone (LoRA), got {min(more)} too. Use engine: transformers."
        )
    return found, alphas.pop() if alphas else 1.0


def named(weights: Weights) -> list[tuple[str, Tensor]]:
    """All tensors of it, by name."""
    return [pair for group in weights.groups for pair in zip(group["param_names"], group["params"], strict=True)]


def shared_folder() -> Path | None:
    """Where a file costs no disk: the system's shared memory, if it can be written."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else None
