"""Products of few rows with a large weight, as decoding has them, on a CPU in float32.

MKL multiplies 4 to 40 rows with a (out, in) weight in up to three times the time that reading the weight takes, on two
threads no faster than on one (docs/performance.md). The same product as a batch of tiles of the weight is bound by
reading it: each tile is multiplied while it is in the cache. Numbers differ from MKL's by the order of their sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

FEW = range(4, 41)  # rows of x; for fewer, and for more, MKL's own product is as fast
SHORT = 8  # rows up to which x is the left factor of each tile's product; above, the tile is
LARGE = 2**19  # elements of a weight; smaller ones stay in the cache
TILE_OF_SHORT, TILE = 64, 256  # rows of the weight in a tile
MAX_ELEMENTS = 2**21  # of the result, that are held a second time: 8 MiB


def concern(module: nn.Module) -> bool:
    """Whether a module has a weight large enough."""
    return any(parameter.numel() >= LARGE for parameter in module.parameters())


def gains(x: Tensor, weight: Tensor) -> bool:
    """Whether x (..., in) times a linear layer's weight (out, in) is faster by tiles."""
    return (
        weight.numel() >= LARGE
        and x.numel() // x.shape[-1] in FEW
        and x.dtype == weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and torch.backends.mkl.is_available()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., out), of x (..., in), W (out, in) contiguous and b (out,); without a graph."""
    rows = x.reshape(-1, x.shape[-1])
    tile = TILE_OF_SHORT if len(rows) <= SHORT else TILE
    tile = tile if len(weight) >= 4 * tile else len(weight)
    result = x.new_empty(len(rows), len(weight))
    whole = len(weight) - len(weight) % tile
    step = max(1, MAX_ELEMENTS // (tile * len(rows))) * tile
    for first in range(0, whole, step):
        block = slice(first, min(first + step, whole))
        tiles = weight[block].view(-1, tile, weight.shape[1])
        result[:, block].view(len(rows), -1, tile).copy_(_by_tiles(rows, tiles))
    if whole < len(weight):
        result[:, whole:] = functional.linear(rows, weight[whole:])
    if bias is not None:
        result += bias
    return result.view(*x.shape[:-1], len(weight))


def _by_tiles(rows: Tensor, tiles: Tensor) -> Tensor:
    """(n, tiles, rows of a tile), of x (n, in) and tiles (tiles, rows of a tile, in) of a weight."""
    if len(rows) <= SHORT:
        return torch.bmm(rows.expand(len(tiles), -1, -1), tiles.mT).transpose(0, 1)
    return torch.bmm(tiles, rows.T.contiguous().expand(len(tiles), -1, -1)).permute(2, 0, 1)


class FewRows(TorchFunctionMode):
    """Within the context, linear layers that gain are multiplied by tiles."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and len(args) > 1 and gains(args[0], args[1]):
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
