"""K completions of one prompt: the prompt goes through the network once, its keys and values serve all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from zopro.engine.local.causal import Decoder, positions
from zopro.engine.local.lengths import by_length, pass_cost

Select = Callable[[Tensor], Tensor]  # hidden states (rows, T, H) of a pass -> those of them that the caller gets


class Watch:
    """Looks on while a backbone runs. This one keeps nothing.

    Attributes:
        whole: passes are to be over all rows, in the batch's order.
    """

    whole = False

    def over(self, rows: Tensor) -> None:
        """Called before each pass with the rows of the batch that it is over, (b,) int64."""

    def expect(self, real: Tensor) -> None:
        """Called first, with (B, C') that says where the completions' tokens stand."""

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        """Around the pass over the prompts alone, one row each, that gives `prompts` its keys and values."""
        yield

    def prompts(self, cache: DynamicCache) -> None:
        """Called with the keys and values of the shared prompts, one row each. Nothing changes them afterwards."""

    @contextmanager
    def passing(self, select: Select) -> Iterator[None]:
        """Around one pass; `select` takes any (b, T, ...) of it to (B, c, ...): what predicts the next c columns."""
        yield


def hidden_shared(
    parts: Decoder,
    ids: Tensor,
    mask: Tensor,
    split: int,
    copies: int,
    watch: Watch | None = None,
    tail: int = 0,
) -> Tensor:
    """Hidden states (B, T - split + 1, H) of each prompt's last token and of every token after it.

    Args:
        parts: the model.
        ids: (B, T): prompts padded on the left in the first `split` columns, completions padded on the right.
        mask: (B, T): 1 on real tokens.
        split: columns of the prompts.
        copies: K; each K consecutive rows have the same prompt.
        watch: looks on.
        tail: the last so many columns of the prompts go through the network with the completions instead, K times.

    Raises:
        ValueError: rows that should share a prompt do not.
    """
    for tensor in (ids, mask):
        groups = tensor[:, :split].unflatten(0, (-1, copies))  # (B / K, K, P)
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise ValueError(f"num_generations: each {copies} consecutive rows must have the same prompt.")
    where, watch = positions(mask), watch or Watch()
    cache = DynamicCache(config=parts.model.config)
    found = []
    if tail == 0:
        watch.over(torch.arange(0, len(ids), copies, device=ids.device))
        with watch.prefilling(), watch.passing(lambda states: states[:, -1:].repeat_interleave(copies, dim=0)):
            prompt = parts.hidden(ids[::copies, :split], mask[::copies, :split], where[::copies, :split], cache)
        found.append(prompt[:, -1:].repeat_interleave(copies, dim=0))
        if ids.shape[1] == split:
            return found[0]
    elif split > tail:
        first = slice(split - tail)
        with watch.prefilling():
            parts.hidden(ids[::copies, first], mask[::copies, first], where[::copies, first], cache)
    watch.prompts(cache)
    everything = torch.arange(len(ids), device=ids.device)
    if tail == 0 and not watch.whole and not torch.is_grad_enabled():
        groups = by_length(mask[:, split:].sum(1).tolist(), pass_cost(ids.device))
        if len(groups) > 1:
            rest = found[0].new_zeros(len(ids), ids.shape[1] - split, found[0].shape[-1])
            for rows in (torch.tensor(group, device=ids.device) for group in groups):
                end = split + int(mask[rows, split:].sum(1).max())
                if end > split:
                    watch.over(rows)
                    seen = ids[rows, split:end], mask[rows, :end], where[rows, split:end]
                    rest[rows, : end - split] = parts.hidden(*seen, read_as(cache, rows // copies))
            return torch.cat([found[0], rest], dim=1)
    watch.over(everything)
    cache = read_as(cache, everything // copies)
    behind, before = slice(split - tail, None), max(0, tail - 1)  # of what runs now, `before` columns predict prompt
    with watch.passing(lambda states: states[:, before:]):
        found.append(parts.hidden(ids[:, behind], mask, where[:, behind], cache)[:, before:])
    return torch.cat(found, dim=1)


def read_as(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """For one pass: a cache with the given rows of this one, which stays as it is; differentiable.

    A layer's rows are made when the pass comes to it and forgotten with what attention reads there, as is what the pass
    adds: one layer's keys and values are repeated at a time, not the whole network's.
    """
    chosen = copy.copy(cache)
    chosen.layers = [read_layer(layer, rows) for layer in cache.layers]
    return chosen


def read_layer(layer: CacheLayerMixin, rows: Tensor) -> CacheLayerMixin:
    """One layer of `read_as`."""
    chosen = copy.copy(layer)
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):

        def update(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            once = copy.copy(layer)
            once.reorder_cache(rows)
            return once.update(*args, **kwargs)

        chosen.update = update
    else:  # such as recurrent states, held in dictionaries
        vars(chosen).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
        chosen.reorder_cache(rows)
    return chosen


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Make the cache's batch the given rows of it, repeated or left out as `rows` (int64) says; differentiable."""
    cache.reorder_cache(rows)  # the one operation of this kind that every cache layer has, recurrent ones included
