"""bfloat16 models on a CPU without bfloat16 instructions: weights stay in bfloat16, products are taken in float32.

Such a CPU multiplies bfloat16 matrices by emulation, several times slower than float32 ones (docs/performance.md).
Converting a piece of a weight, multiplying it while it is in the cache and rounding the result gives the same numbers, a
bfloat16 rounding of sums in float32, at float32's speed, in the memory of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from zopro.engine.local import few_rows

PIECE_ELEMENTS = 2**19  # of a weight, converted at a time: 2 MiB in float32
NARROW = 256  # rows or columns of a weight: narrower ones, such as LoRA's, have nothing to gain
FEW = 8  # rows of x: fewer are bound by reading the weight


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 matrices (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this type would be emulated on this device."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16()


def is_untouched(layer: nn.Module) -> bool:
    """Whether a layer does what its class does: nothing looks on, and nothing runs in its place."""
    return not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def fast_products(dtype: torch.dtype, device: torch.device, rows: int = 0) -> AbstractContextManager[Any]:
    """Within the context, wide linear layers and attention of such a model run as said above; others as they are.

    With `rows`, the number of rows that go through the layers, those of a float32 model on a CPU run as
    `zopro.engine.local.few_rows` says, if they are few.
    """
    if emulated(dtype, device):
        return _InFloat32()
    few = rows in few_rows.FEW and dtype == torch.float32 and device.type == "cpu"
    return few_rows.FewRows() if few else nullcontext()


def times_weight(x: Tensor, weight: Tensor) -> Tensor:
    """x W, (n, in) in fp32, of fp32 x (n, out) and a linear layer's W (out, in): the way back through the layer."""
    if not emulated(weight.dtype, weight.device):
        return (x.to(weight.dtype) @ weight).float()
    result = x.new_zeros(len(x), weight.shape[1], dtype=torch.float32)
    for piece in _pieces(weight):
        result.addmm_(x[:, piece].float(), weight[piece].float())
    return result


class _InFloat32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and len(args) > 1 and _gains(args[0], args[1]):
            return linear(*args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs and _gains(args[1], args[2]):  # GPT-2's Conv1D
            return linear(args[1], args[2].T, args[0])
        if func is functional.scaled_dot_product_attention and args and args[0].dtype == torch.bfloat16:
            return _widened(func, args, kwargs)
        return func(*args, **kwargs)


def _gains(x: Tensor, weight: Tensor) -> bool:
    same = id(weight) not in few_rows.elsewhere and x.dtype == weight.dtype == torch.bfloat16
    return same and min(weight.shape) > NARROW and x.numel() >= FEW * x.shape[-1]


def _widened(func: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value

    wide = {name: widen(value) for name, value in kwargs.items()}
    return func(*(widen(value) for value in args), **wide).to(torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., out) in bfloat16, of bfloat16 x (..., in), W (out, in) and b (out,); differentiable."""
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


def _pieces(weight: Tensor) -> Iterator[slice]:
    rows = max(1, PIECE_ELEMENTS // weight.shape[1])
    return (slice(first, first + rows) for first in range(0, len(weight), rows))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    wide = x.float()
    result = x.new_empty(*x.shape[:-1], len(weight))
    for piece in _pieces(weight):
        added = None if bias is None else bias[piece].float()
        result[..., piece] = functional.linear(wide, weight[piece].float(), added)
    return result


class _Linear(torch.autograd.Function):
    """Keeps x and W for the backward pass as they are, in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = upstream.flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            times_weight(rows, weight).to(x.dtype).view(x.shape) if of_x else None,
            _product(rows.T, x.flatten(0, -2).T) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
