"""The cache that grows in place holds what transformers' own does, and copies only when its room is full."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tiny import tiny_model, tiny_tokenizer
from zopro.engine.local.growing import ROOM, GrowingLayer, GrowingSlidingWindowLayer, growing_cache

WINDOW = 12


@pytest.fixture(scope="module")
def config():
    """Of a model with sliding and full layers."""
    config = tiny_model("gemma3", tiny_tokenizer()).config
    config.sliding_window = WINDOW
    return config


def drawn(rows, tokens, seed):
    return torch.randn((2, rows, 1, tokens, 4), generator=torch.Generator().manual_seed(seed))


def steps(prompt, tokens):
    yield prompt
    yield from [1] * tokens


@torch.no_grad()
@pytest.mark.parametrize("prompt", [3, WINDOW - 1, WINDOW, 3 * WINDOW])
def test_holds_what_a_dynamic_cache_holds(config, prompt):
    """Over more tokens than its room and the window, with rows repeated, dropped and exchanged on the way."""
    ours, theirs = growing_cache(config), DynamicCache(config=config)
    assert {type(layer) for layer in ours.layers} == {GrowingLayer, GrowingSlidingWindowLayer}
    rows = 2
    for number, tokens in enumerate(steps(prompt, 2 * ROOM + 5)):
        for layer in range(len(theirs.layers)):
            added = drawn(rows, tokens, 100 * number + layer)
            sizes = [cache.get_mask_sizes(tokens, layer) for cache in (ours, theirs)]
            assert sizes[0] == sizes[1]
            for mine, its in zip(ours.update(*added, layer), theirs.update(*added, layer), strict=True):
                assert torch.equal(mine, its)
            assert torch.equal(ours.layers[layer].keys, theirs.layers[layer].keys)
            assert torch.equal(ours.layers[layer].values, theirs.layers[layer].values)
            assert ours.get_seq_length(layer) == theirs.get_seq_length(layer)
        order = {0: [0, 0, 1, 1], 7: [3, 1, 0], ROOM: [1]}.get(number)
        if order is not None:
            ours.reorder_cache(torch.tensor(order))
            theirs.reorder_cache(torch.tensor(order))
            rows = len(order)


@torch.no_grad()
def test_a_token_is_written_where_there_is_room(config):
    """Memory is taken when the first token follows the prompt, and when its room is full."""
    cache = growing_cache(config)
    layers = range(len(cache.layers))
    moved = dict.fromkeys(layers, 0)
    before = {layer: cache.update(*drawn(2, 5, 0), layer) for layer in layers}
    for number in range(2 * ROOM):
        for layer in layers:
            after = cache.update(*drawn(2, 1, number), layer)
            moved[layer] += [one.untyped_storage().data_ptr() for one in after] != [
                one.untyped_storage().data_ptr() for one in before[layer]
            ]
            before[layer] = after
    assert set(moved.values()) == {2}


@torch.no_grad()
def test_rows_that_are_dropped_leave_no_memory_behind(config):
    cache = growing_cache(config)
    for tokens in (5, 1):
        cache.update(*drawn(8, tokens, tokens), 0)
    before = cache.layers[0].keys.untyped_storage()
    reference = torch.multiprocessing.reductions.StorageWeakRef(before)
    del before
    assert not reference.expired()
    cache.reorder_cache(torch.tensor([0]))
    assert reference.expired()
