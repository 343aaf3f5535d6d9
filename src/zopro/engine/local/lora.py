"""LoRA beside a layer in 16 bits, in fewer passes over tensors as large as the layer's output than PEFT's own steps.

PEFT keeps A and B in float32. So it widens x, multiplies, scales, adds and rounds: passes that together take a CPU with
bfloat16 instructions longer than the layer's own product (docs/performance.md), and that a GPU waits for, one launch
each. There are two shorter ways. Both are for passes without gradients.

In one product, of many rows in bfloat16: A and B go in as sums of two bfloat16 numbers each, 16 bits of their 24, so that
a finite difference still sees small displacements. What is rounded to bfloat16 is A x and the sum, which the layer's
output is as well. Added in place, on a GPU, of few rows (decoding): PEFT's own products, in float32; scaling, sum
and rounding are one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack
from transformers.pytorch_utils import Conv1D

from zopro.engine.local.products import is_untouched, multiplies_bfloat16

MANY = {"cpu": 256, "cuda": 4096}  # rows of x; for fewer, taking A and B apart costs what it saves
LAUNCHED = {"cuda"}  # kinds of device that wait for the launch of each kernel
HALF = (torch.bfloat16, torch.float16)


def _way(dtype: torch.dtype, device: torch.device, rows: int) -> type[lora.layer.LoraVariant] | None:
    """How adapters in a model of this type are multiplied; None as PEFT does it."""
    able = device.type in LAUNCHED or (device.type == "cpu" and multiplies_bfloat16())
    if able and dtype == torch.bfloat16 and rows >= MANY[device.type]:
        return _InOneProduct
    return _Added if device.type in LAUNCHED and dtype in HALF else None


def _adapted(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[lora.Linear]:
    for layer in module.modules():
        if type(layer) is lora.Linear and isinstance(layer.base_layer, nn.Linear | Conv1D):
            weight: Any = layer.base_layer.weight
            if weight.dtype == dtype and weight.device.type == device.type:
                yield layer


@contextmanager
def fewer_passes(module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int) -> Iterator[None]:
    """Within the context adapters in a model of this type, through which so many rows of x go, are multiplied as said
    above.

    Gradients, torch function modes (which hand out other weights) and hooks within a layer need PEFT's own steps.
    """
    way = _way(dtype, device, rows)
    if way is None or torch.is_grad_enabled() or _get_current_function_mode_stack():
        yield
        return
    taken = [layer for layer in _adapted(module, dtype, device) if _is_plain(layer)]
    casts = [layer.cast_input_dtype_enabled for layer in taken]
    for layer in taken:
        layer.cast_input_dtype_enabled = way is _Added
        layer.lora_variant.update(dict.fromkeys(layer.active_adapters, way))
    try:
        yield
    finally:
        for layer, cast in zip(taken, casts, strict=True):
            layer.cast_input_dtype_enabled = cast
            for name in layer.active_adapters:
                del layer.lora_variant[name]


def _is_plain(layer: lora.Linear) -> bool:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    parts = [layer.base_layer, *(part[name] for part in (layer.lora_A, layer.lora_B) for name in names)]
    return not (
        layer.lora_variant.keys() & set(layer.active_adapters)
        or any(layer.lora_bias[name] or layer.lora_A[name].weight.dtype != torch.float32 for name in names)
        or not all(map(is_untouched, parts))
        or (layer.training and any(not isinstance(layer.lora_dropout[name], nn.Identity) for name in names))
    )


class _InOneProduct(lora.layer.LoraVariant):
    """What PEFT calls for an adapter, in place of its own product."""

    @staticmethod
    def forward(module: lora.Linear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        a = module.lora_A[active_adapter].weight  # (r, in)
        b = module.lora_B[active_adapter].weight * module.scaling[active_adapter]  # (out, r)
        first, second = _two_numbers(b)
        reduced = functional.linear(x.flatten(0, -2), torch.cat(_two_numbers(a)))  # (n, 2 r): A1 x, A2 x
        reduced = torch.cat((reduced, reduced[:, : len(a)]), dim=1)  # (n, 3 r)
        factors = torch.cat((first, first, second), dim=1)  # (out, 3 r); A2 x by the second number is too small to add
        result.view(-1, result.shape[-1]).addmm_(reduced, factors.T)
        return result


class _Added(lora.layer.LoraVariant):
    """The same, of x in float32."""

    @staticmethod
    def forward(module: lora.Linear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        product = functional.linear(functional.linear(x, a), b)
        return result.add_(product, alpha=module.scaling[active_adapter])


def _two_numbers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 tensors whose sum is a float32 one, to 16 bits."""
    first = weight.to(torch.bfloat16)
    return first, (weight - first).to(torch.bfloat16)
