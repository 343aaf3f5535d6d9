"""A KV cache that grows in place: `DynamicCache` copies a layer's keys and values for every token it adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 32  # tokens for which memory is taken at a time


class _Room:
    """Memory with room behind one of a layer's tensors, (B, heads, T, dim)."""

    def __init__(self) -> None:
        self._memory = self._held = torch.empty(0)
        self._end = 0  # of what is written in the memory

    def joined(self, held: Tensor, added: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """cat([held, added], dim=-2) and the last `kept` tokens of it; nothing of `held` is copied if that was given."""
        length, new = held.shape[-2], added.shape[-2]
        end = self._end + new
        if held is not self._held or end > self._memory.shape[-2]:
            end = length + new
            self._memory = held.new_empty(*held.shape[:-2], end + ROOM, held.shape[-1])
            self._memory[..., :length, :] = held
        self._memory[..., end - new : end, :] = added
        self._held, self._end = self._memory[..., max(end - kept, end - new - length) : end, :], end
        return self._memory[..., end - new - length : end, :], self._held


class GrowingLayer(DynamicLayer):
    """`DynamicLayer`, without a graph."""

    keys: Tensor
    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._rooms = _Room(), _Room()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rooms = _Room(), _Room()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        return self._joined(key_states, value_states, self.keys.shape[-2] + key_states.shape[-2])

    def _joined(self, key_states: Tensor, value_states: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        keys, self.keys = self._rooms[0].joined(self.keys, key_states, kept)
        values, self.values = self._rooms[1].joined(self.values, value_states, kept)
        return keys, values


class GrowingSlidingWindowLayer(DynamicSlidingWindowLayer, GrowingLayer):
    """`DynamicSlidingWindowLayer`, without a graph; tokens that left the window go with the memory they are in."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        return self._joined(key_states, value_states, self.sliding_window - 1)


def growing_cache(config: Any) -> DynamicCache:
    """An empty `DynamicCache` for a model of this configuration, of which layers of keys and values grow in place."""
    cache = DynamicCache(config=config)
    cache.layers = [_growing(layer) for layer in cache.layers]
    return cache


def _growing(layer: CacheLayerMixin) -> CacheLayerMixin:
    if type(layer) is DynamicSlidingWindowLayer:
        return GrowingSlidingWindowLayer(sliding_window=layer.sliding_window)
    return GrowingLayer() if type(layer) is DynamicLayer else layer
