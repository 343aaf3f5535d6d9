"""A cache of fixed size: keys and values at fixed addresses, each new token written at a column that the device counts.

transformers' `StaticCache` differs in two ways. Its sliding layers go by a number on the host once the window is full,
which a replayed graph would not see; here they keep all columns, and the mask says which are in the window. And its
memory is one shape: here it is one block a layer, looked at as (rows, heads, columns, dim) of whatever a batch needs, so
that graphs of several shapes share it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from zopro.engine.local.growing import GrowingLayer, GrowingSlidingWindowLayer

SIMPLE = (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer, GrowingSlidingWindowLayer)  # keys and values alone


class Unsuited(Exception):
    """A cache with more than keys and values; says what."""


class FixedLayer(CacheLayerMixin):
    """Keys and values (rows, heads, columns, dim) of one layer, read whole; what is behind `column` the mask hides.

    Args:
        keys, values: views of memory that stays.
        column: (1,) int64, where the next token goes.
        sliding: the model masks this layer by a window.
    """

    is_compileable = True  # so that transformers makes masks without a look at values

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor, sliding: bool) -> None:
        super().__init__()
        self.keys, self.values, self.column, self.is_sliding = keys, values, column, sliding
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise RuntimeError("a cache of fixed size is made whole")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[-2], 0

    def get_seq_length(self) -> Any:
        return self.column.view(())

    def get_max_length(self) -> int:
        return int(self.keys.shape[-2])


class Blocks:
    """The memory of all layers' keys and values for so many cells (rows x columns).

    Args:
        like: a prompt's cache, whose layers have the shapes.
        cells: rows x columns to hold.
        column: as in `FixedLayer`.

    Raises:
        Unsuited: a layer holds something else than keys and values.
    """

    def __init__(self, like: DynamicCache, cells: int, column: Tensor) -> None:
        self.cells, self.column = cells, column
        self._layers: list[tuple[list[Tensor], list[tuple[int, int]], bool]] = []
        for layer in like.layers:
            if type(layer) not in SIMPLE or not layer.is_initialized:
                raise Unsuited(f"its cache has a {type(layer).__name__}")
            tensors = [layer.keys, layer.values]
            shapes = [(tensor.shape[1], tensor.shape[3]) for tensor in tensors]
            blocks = [t.new_empty(cells * heads * dim) for t, (heads, dim) in zip(tensors, shapes, strict=True)]
            self._layers.append((blocks, shapes, isinstance(layer, DynamicSlidingWindowLayer)))

    def fits(self, like: DynamicCache, cells: int) -> bool:
        """Whether this many cells of such a cache have room."""
        kinds = [[(t.shape[1], t.shape[3], t.dtype) for t in (layer.keys, layer.values)] for layer in like.layers]
        held = [[(*s, b.dtype) for b, s in zip(blocks, shapes, strict=True)] for blocks, shapes, _ in self._layers]
        return cells <= self.cells and kinds == held

    def _views(self, rows: int, columns: int) -> list[tuple[Tensor, Tensor, bool]]:
        """Keys and values of each layer, (rows, heads, columns, dim), and whether it slides."""
        views = []
        for blocks, shapes, sliding in self._layers:
            pair = [
                block[: rows * heads * columns * dim].view(rows, heads, columns, dim)
                for block, (heads, dim) in zip(blocks, shapes, strict=True)
            ]
            views.append((pair[0], pair[1], sliding))
        return views

    def cache(self, rows: int, columns: int, seen: int) -> Cache:
        """A cache over the first `rows` rows and `seen` columns of those that are `columns` wide."""
        return Cache(
            layers=[
                FixedLayer(keys[:, :, :seen], values[:, :, :seen], self.column, sliding)
                for keys, values, sliding in self._views(rows, columns)
            ]
        )

    def fill(self, prompts: DynamicCache, copies: int, rows: int, columns: int, end: int) -> None:
        """Begin with each prompt's keys and values `copies` times, in columns before `end`; all others are 0.

        What is behind the mask is multiplied by 0, which leaves a NaN of an earlier batch what it is.
        """
        for (keys, values, _), layer in zip(self._views(rows, columns), prompts.layers, strict=True):
            for memory, held in ((keys, layer.keys), (values, layer.values)):
                memory.zero_()
                first = end - held.shape[-2]  # a sliding layer has kept no more than its window
                filled = memory[: len(held) * copies, :, first:end].unflatten(0, (len(held), copies))
                filled.copy_(held[:, None].expand_as(filled))

    def keep(self, rows: Tensor, before: int, columns: int, end: int) -> None:
        """Make the first of `before` rows these (int64), as far as column `end`."""
        for keys, values, _ in self._views(before, columns):
            for memory in (keys, values):
                memory[: len(rows), :, :end] = memory[:, :, :end].index_select(0, rows)
