"""Products of few rows with a large weight, as decoding has them, on a CPU in float32.

MKL multiplies 4 to 40 rows with a (out, in) weight in up to three times the time that reading the weight takes, on two
threads no faster than on one (docs/performance.md). The same product as a batch of tiles of the weight is bound by
reading it: each tile is multiplied while it is in the cache. Numbers differ from MKL's by the order of their sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

FEW = range(4, 41)  # rows of x; for fewer, and for more, MKL's own product is as fast
SHORT = 8  # rows up to which x is the left factor of each tile's product; above, the tile is
LARGE = 2**19  # elements of a weight; smaller ones stay in the cache
TILE_OF_SHORT, TILE = 64, 256  # rows of the weight in a tile
MAX_ELEMENTS = 2**21  # of a result, that are held a second time: 8 MiB

elsewhere: set[int] = set()  # ids of weights whose products something else takes


@contextmanager
def left_alone(weights: Iterable[int]) -> Iterator[None]:
    """Within the context, layers with these weights, given by their ids, are multiplied as if there were no tiles."""
    added = set(weights) - elsewhere
    elsewhere.update(added)
    try:
        yield
    finally:
        elsewhere.difference_update(added)


def concern(module: nn.Module) -> bool:
    """Whether a module has a weight large enough."""
    return any(parameter.numel() >= LARGE for parameter in module.parameters())


def gains(x: Tensor, weight: Tensor) -> bool:
    """Whether x (..., in) times a linear layer's weight (out, in) is faster by tiles."""
    return (
        weight.numel() >= LARGE
        and id(weight) not in elsewhere
        and x.numel() // x.shape[-1] in FEW
        and x.dtype == weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and torch.backends.mkl.is_available()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., out), of x (..., in), W (out, in) contiguous and b (out,); without a graph.

    A large result of more than SHORT rows has its rows as columns in memory.
    """
    rows = x.reshape(-1, x.shape[-1])
    product, tile = (_by_rows, TILE_OF_SHORT) if len(rows) <= SHORT else (_by_columns, TILE)
    tile = tile if len(weight) >= 4 * tile else len(weight)
    whole = len(weight) - len(weight) % tile
    result = product(rows, weight[:whole].view(-1, tile, weight.shape[1]), len(weight))
    if whole < len(weight):
        result[:, whole:] = functional.linear(rows, weight[whole:])
    if bias is not None:
        result += bias
    return result.view(*x.shape[:-1], len(weight))


def _by_rows(rows: Tensor, tiles: Tensor, outputs: int) -> Tensor:
    """(n, outputs), filled as far as there are tiles, of x (n, in) and tiles (tiles, rows of a tile, in) of a weight."""
    tile = tiles.shape[1]
    result = rows.new_empty(len(rows), outputs)
    step = max(1, MAX_ELEMENTS // (tile * len(rows)))
    for first in range(0, len(tiles), step):
        several = tiles[first : first + step]
        block = result[:, first * tile : (first + len(several)) * tile].view(len(rows), -1, tile)
        block.copy_(torch.bmm(rows.expand(len(several), -1, -1), several.mT).transpose(0, 1))
    return result


def _by_columns(rows: Tensor, tiles: Tensor, outputs: int) -> Tensor:
    """The same, of a matrix (outputs, n) that is returned transposed: as it is if large, else brought into rows."""
    result = rows.new_empty(outputs, len(rows))
    filled = result[: tiles.shape[0] * tiles.shape[1]].view(*tiles.shape[:2], len(rows))
    torch.bmm(tiles, rows.T.contiguous().expand(len(tiles), -1, -1), out=filled)
    return result.T if result.numel() > MAX_ELEMENTS else result.T.contiguous()


class FewRows(TorchFunctionMode):
    """Within the context, linear layers that gain are multiplied by tiles."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and len(args) > 1 and gains(args[0], args[1]):
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
