"""LoRA beside a bfloat16 layer, on a CPU with bfloat16 instructions: B A x is added to the layer's output in one product.

PEFT keeps A and B in float32. So it widens x, multiplies, scales, adds and rounds: passes over tensors as large as the
layer's output, which together take such a CPU longer than the layer's own product (docs/performance.md). Here A and B go
into bfloat16 products as sums of two bfloat16 numbers each, 16 bits of their 24, so that a finite difference still sees
small displacements. What is rounded to bfloat16 is A x and the sum, which the layer's output is as well.
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

MANY = 256  # rows of x; for fewer, as in decoding, taking A and B apart costs what it saves


def adapted(module: nn.Module) -> list[lora.Linear]:
    """The layers within a module whose adapters can be multiplied as said above."""
    layers = (layer for layer in module.modules() if type(layer) is lora.Linear)
    return [layer for layer in layers if _is_narrow(layer.base_layer)]


def _is_narrow(base: Any) -> bool:
    if not isinstance(base, nn.Linear | Conv1D):
        return False
    return base.weight.dtype == torch.bfloat16 and base.weight.device.type == "cpu"


@contextmanager
def in_one_product(module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int) -> Iterator[None]:
    """Within the context adapters in a model of this type are multiplied as said above, where `rows` of x are many.

    Gradients, torch function modes (which hand out other weights) and hooks within a layer need PEFT's own steps.
    """
    gains = rows >= MANY and dtype == torch.bfloat16 and device.type == "cpu" and multiplies_bfloat16()
    if not gains or torch.is_grad_enabled() or _get_current_function_mode_stack():
        yield
        return
    taken = [layer for layer in adapted(module) if _is_plain(layer)]
    casts = [layer.cast_input_dtype_enabled for layer in taken]
    for layer in taken:
        layer.cast_input_dtype_enabled = False
        layer.lora_variant.update(dict.fromkeys(layer.active_adapters, _InOneProduct))
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


def _two_numbers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 tensors whose sum is a float32 one, to 16 bits."""
    first = weight.to(torch.bfloat16)
    return first, (weight - first).to(torch.bfloat16)
